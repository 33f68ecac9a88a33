"""Named inputs of reverse_step, for the tests and the benchmarks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .coefficients import StepCoefficients
from .library import step_counter

# DDPM's step t = 500 of the linear schedule, T = 1000, for each prediction type: out's share in x0.
POSTERIOR = dict(coef_x=0.9949, coef_x0=0.0051, coef_x0_prev=0.0, coef_output=0.0, sigma=0.1003)
EPSILON = StepCoefficients(500, 1.0, 3.5791, -3.4365, 1.0, **POSTERIOR)
SAMPLE = StepCoefficients(500, 1.0, 0.0, 1.0, 1.0, **POSTERIOR)
V_PREDICTION = StepCoefficients(500, 1.0, 0.2794, -0.9602, 1.0, **POSTERIOR)
MULTISTEP = EPSILON._replace(coef_x=0.9, coef_x0=0.4, coef_x0_prev=-0.13)


class Case(NamedTuple):
    """Normal tensors of this shape and spread; with `learned`, model_output has 2C channels."""

    shape: tuple[int, ...]
    row: StepCoefficients
    guided: bool = False
    learned: bool = False
    x0_prev: bool = False
    noise: bool = False
    spread: float = 1.0
    seed: int = 0
    sample_ids: tuple[int, ...] | None = None
    stream: int = 1

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[tuple, dict]:
        """Positional and keyword arguments of one call, model outputs in `dtype`, the rest float32."""
        generator = torch.Generator().manual_seed(seed)

        def normal(
            shape: Sequence[int], dtype: torch.dtype = torch.float32, spread: float = self.spread
        ) -> torch.Tensor:
            values = torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu") * spread
            return values.to(device, dtype)

        out_shape = (self.shape[0], self.shape[1] * (1 + self.learned), *self.shape[2:])
        ids = None if self.sample_ids is None else torch.tensor(self.sample_ids, device=device)
        x, out = normal(self.shape), normal(out_shape, dtype)
        return (x, out, self.row), {
            "model_output_uncond": normal(out_shape, dtype) if self.guided else None,
            "x0_prev": normal(self.shape) if self.x0_prev else None,
            "noise": normal(self.shape, spread=1.0) if self.noise else None,
            "seed": self.seed,
            "sample_ids": ids,
            "stream": self.stream,
        }


CASES = {
    "mnist": Case((16, 1, 28, 28), EPSILON),
    "cifar10_guided": Case((8, 3, 32, 32), EPSILON._replace(guidance_scale=3.0), guided=True),
    "cifar10_guided_64": Case((64, 3, 32, 32), EPSILON._replace(guidance_scale=3.0), guided=True),
    "imagenet64_guided": Case((8, 3, 64, 64), EPSILON._replace(guidance_scale=1.5), guided=True),
    "sample": Case((2, 3, 8, 8), SAMPLE),
    "v_prediction": Case((2, 3, 8, 8), V_PREDICTION, guided=True),
    "unclipped": Case((2, 3, 8, 8), EPSILON._replace(clip_x0=math.inf)),
    "last_step": Case((4, 3, 8, 8), EPSILON._replace(timestep=0.0, sigma=0.0), noise=True),
    "ddim": Case((2, 3, 8, 8), EPSILON._replace(coef_x=0.0, coef_x0=0.31, coef_output=0.95, sigma=0.0)),
    "multistep": Case((2, 3, 8, 8), MULTISTEP._replace(sigma=0.0), x0_prev=True),
    "multistep_sde": Case((3, 1, 9, 9), MULTISTEP, x0_prev=True, noise=True),
    "learned_variance": Case((4, 3, 16, 16), EPSILON._replace(sigma=1.0, log_var_min=-4.7, log_var_max=-4.5),
                             learned=True),
    "learned_guided": Case((3, 3, 5, 7), EPSILON._replace(sigma=1.0, guidance_scale=2.5, log_var_min=-46.0,
                                                          log_var_max=-9.2), guided=True, learned=True),
    "unguided_scale": Case((2, 3, 8, 8), EPSILON._replace(guidance_scale=0.0), guided=True),
    "odd": Case((3, 5, 7, 11), EPSILON, noise=True),
    "one_element": Case((3, 1), EPSILON),
    "sequence": Case((2, 4, 129), EPSILON),
    "many_tiles": Case((2, 3, 65, 65), EPSILON, sample_ids=(5, 9)),
    "large_values": Case((2, 3, 16, 16), EPSILON._replace(clip_x0=math.inf), spread=1e3),
    "large_ids": Case((2, 1, 6, 6), EPSILON, sample_ids=(2**32, 2**63 - 1), seed=2**64 - 1, stream=2**32 - 1),
    "empty_batch": Case((0, 3, 8, 8), EPSILON),
    "empty_sample": Case((2, 3, 0, 8), EPSILON),
}  # fmt: skip

# The shapes of real models.
BENCHMARKED = (
    "mnist",
    "cifar10_guided",
    "cifar10_guided_64",
    "imagenet64_guided",
    "learned_variance",
    "multistep",
)


class InPlace(NamedTuple):
    """A case of `reverse_step_`, which also writes the next input of a UNet: twice with guidance."""

    case: Case
    rows: int = 1 << 16  # identical rows, one for each call

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seed: int = 0
    ) -> tuple[tuple, dict]:
        """Positional and keyword arguments of a call, model outputs and unet_input in `dtype`."""
        (x, out, row), options = self.case.inputs(dtype, device, seed)
        table = torch.tensor([row], dtype=torch.float64, device=device).repeat(self.rows, 1)
        counter = step_counter(options["seed"], options["stream"], device)
        ids = options["sample_ids"]
        return (x, out, table, counter), {
            "sample_ids": torch.arange(len(x), device=device) if ids is None else ids,
            "model_output_uncond": options["model_output_uncond"],
            "x0": options["x0_prev"],
            "noise": options["noise"],
            "unet_input": x.new_empty(((1 + self.case.guided) * len(x), *x.shape[1:]), dtype=dtype),
        }
