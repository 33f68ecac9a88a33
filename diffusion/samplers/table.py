"""A sampler's step table: one row of numbers per step.

The package's docstring has the meaning of a row and the arguments that all samplers share.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ..kernels import StepCoefficients
from ..process.prediction import x0_coefficients
from ..utils.validation import number, switch
from ..utils.words import counted
from .guidance import guidance_scales

HEAD, TAIL = 5, 3  # rows that are shown of a long table


@dataclass(frozen=True, eq=False)
class History:
    """The predictions that the steps of a solver take from earlier steps, beyond a row's coef_x0_prev.

    Step i keeps m_i = from_x[i] * x + from_x0[i] * x0, with the x that it starts from and its x0. In its row,
    coef_x0_prev is 1 and x0_prev is the sum of weights[i, k] * m_{i-1-k} over k, or both are 0.

    from_x, from_x0: float64 [n]. weights: float64 [n, K], for a solver that recalls K evaluations.
    """

    from_x: torch.Tensor
    from_x0: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class StepTable:
    """The steps of a sampler.

    table: float64 [n, 12], the `StepCoefficients` of each step, in order.
    alphas, sigmas: float64 [n], of the image alphas * x_0 + sigmas * z that each step starts from.
    learned_variance: the variance of each step is the model's (its output has 2C channels).
    history: for solvers whose steps use more than the x_0 of the step before; None for all others.
    initial_scale: standard deviation of the initial noise.
    """

    table: torch.Tensor
    alphas: torch.Tensor
    sigmas: torch.Tensor
    learned_variance: bool = False
    history: History | None = None
    initial_scale: float = 1.0

    def __post_init__(self) -> None:
        # The steps run in float32; only the clip may be infinite.
        numbers = self.table.clone()
        numbers[:, StepCoefficients._fields.index("clip_x0")] = 0
        parts = [numbers] if self.history is None else [numbers, *vars(self.history).values()]
        if not all((part.abs() <= torch.finfo(torch.float32).max).all() for part in parts):
            raise ValueError(
                "the schedule or an option is too extreme: a step's coefficients overflow float32"
            )

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        """A line, and the first and last rows, without columns of zeros."""
        about = ", variance of the model" if self.learned_variance else ""
        about += "" if self.history is None else ", with earlier predictions"
        about += (
            "" if self.initial_scale == 1 else f", from noise of standard deviation {self.initial_scale:g}"
        )
        used = (self.table != 0).any(0).tolist()
        used[0] = True  # the timestep
        shown = list(range(len(self)))
        if len(self) > HEAD + TAIL + 1:
            shown = [*shown[:HEAD], -1, *shown[-TAIL:]]
        columns = [["row", *("..." if i < 0 else str(i) for i in shown)]]
        for name, column, keep in zip(StepCoefficients._fields, self.table.T.tolist(), used, strict=True):
            if keep:
                columns.append([name, *("..." if i < 0 else f"{column[i]:.6g}" for i in shown)])
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in zip(*columns, strict=True)
        ]
        return "\n".join([f"StepTable of {counted(len(self), 'row')}{about}:", *lines])

    @cached_property
    def timesteps(self) -> torch.Tensor:
        """int64 [n], decreasing, or float64 [n] where noise levels take the place of timesteps.

        Several steps may share one where a solver spaces noise levels, or evaluates the network twice.
        """
        timesteps = self.table[:, StepCoefficients._fields.index("timestep")]
        return timesteps.to(torch.int64) if (timesteps == timesteps.round()).all() else timesteps

    @cached_property
    def needs_x0_prev(self) -> bool:
        """Whether a step uses the x_0 of the step before."""
        return bool((self.table[:, StepCoefficients._fields.index("coef_x0_prev")] != 0).any())

    def column(self, name: str) -> list[float]:
        """One field of `kernels.StepCoefficients` for all steps."""
        return self.table[:, StepCoefficients._fields.index(name)].tolist()

    def row(self, i: int) -> StepCoefficients:
        """Step i, as Python floats."""
        return StepCoefficients(*self.table[i].tolist())


def make_table(
    timesteps: torch.Tensor,
    alphas_cumprod: torch.Tensor,
    prediction_type: str,
    clip: float | None,
    guidance_scale: float,
    guidance_interval: tuple[float, float] | None,
    columns: dict[str, torch.Tensor],
    *,
    learned_variance: bool = False,
    noise_in_last_step: bool = False,
    history: History | None = None,
    start: int = 0,
) -> StepTable:
    """The table for timesteps [n] and alphas_cumprod [n] there, or its rows from `start` on.

    columns: the fields of `StepCoefficients` that the sampler sets, each [n]; those left out are 0. sigma of
    the last step becomes 0, unless noise_in_last_step is true and this step starts above timestep 0. The
    other arguments are those of all samplers.
    """
    clip = math.inf if clip is None else number("clip", clip, 0, infinite=True)
    timesteps, alphas_cumprod = timesteps[start:], alphas_cumprod[start:]
    columns = {name: column[start:] for name, column in columns.items()} | {"timestep": timesteps}
    columns["guidance_scale"] = guidance_scales(timesteps, guidance_scale, guidance_interval)
    columns["x0_from_x"], columns["x0_from_output"] = x0_coefficients(prediction_type, alphas_cumprod)
    columns["clip_x0"] = torch.full_like(alphas_cumprod, clip)
    table = torch.zeros(len(timesteps), len(StepCoefficients._fields), dtype=torch.float64, device="cpu")
    for name, column in columns.items():
        table[:, StepCoefficients._fields.index(name)] = column
    if not noise_in_last_step or timesteps[-1] == 0:
        table[-1, StepCoefficients._fields.index("sigma")] = 0
    if history is not None:
        history = History(history.from_x[start:], history.from_x0[start:], history.weights[start:])
    alphas, sigmas = alphas_cumprod.double().sqrt(), (1 - alphas_cumprod.double()).sqrt()
    return StepTable(table, alphas, sigmas, learned_variance, history)


def first_step(steps: int, strength: float) -> int:
    """The step, of `steps`, at which an image gets its noise so that the share `strength` of them is taken.

    Rounded down, as in diffusers. ValueError for a strength outside (0, 1], or so small that no step remains.
    """
    taken = int(steps * number("strength", strength, above=0, most=1) + 1e-9)  # 0.29 of 100 steps are 29
    if taken == 0:
        raise ValueError(
            f"strength {strength:g} of {counted(steps, 'step')} leaves none; give at least {1 / steps:.2g}"
        )
    return steps - taken


def tiny_signal(alphas_cumprod: torch.Tensor, epsilon_at_zero_snr: bool) -> torch.Tensor:
    """alphas_cumprod with 1e-30 in place of 0, if x_0 is to follow from epsilon there all the same.

    x_0 is then huge, and clipping leaves the sign of x - epsilon, as where diffusers divides by 0.
    """
    if not switch("epsilon_at_zero_snr", epsilon_at_zero_snr):
        return alphas_cumprod
    return torch.where(alphas_cumprod > 0, alphas_cumprod, 1e-30)


def next_alphas_cumprod(alphas_cumprod: torch.Tensor, final: float = 1.0) -> torch.Tensor:
    """alphas_cumprod at the timestep that each step leads to: the next one's, and `final` at the end.

    final: 1 is no noise; in (0, 1].
    """
    return torch.cat([alphas_cumprod[1:], alphas_cumprod.new_full((1,), final)])
