"""One step of the reverse process, for every sampler."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._dispatch import Backend, Op, always
from ..._registry import InternalOp, PublicOp
from . import native, reference, triton_launch
from .arguments import Arguments, InPlaceArguments, validate
from .coefficients import ROW_LENGTH, StepCoefficients
from .in_place import op as op_in_place
from .in_place import reverse_step_, step_counter

__all__ = ["StepCoefficients", "reverse_step", "reverse_step_", "step_counter"]

op = Op(
    "reverse_step",
    {
        "cuda": Backend(native.reverse_step, native.supports_cuda),
        "cpp": Backend(native.reverse_step, native.supports_cpp),
        "triton": Backend(triton_launch.reverse_step, triton_launch.supports),
        "reference": Backend(reference.reverse_step, always),
    },
    validate,
)


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    row: StepCoefficients | Sequence[float] | Tensor,
    *,
    model_output_uncond: Tensor | None = None,
    x0_prev: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    sample_ids: Tensor | Sequence[int] | None = None,
    stream: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(x_next, x0), both of x's shape and dtype: from x_t to x_{t-1} by one row of a step table.

        out    = uncond + guidance_scale * (cond - uncond)      or model_output, where there is no uncond
        x0     = clamp(x0_from_x * x + x0_from_output * out, -clip_x0, clip_x0)
        x_next = coef_x * x + coef_x0 * x0 + coef_x0_prev * x0_prev + coef_output * out + sigma * z

    DDPM (Ho et al. 2020, eq. 11), DDIM (Song et al. 2021, eq. 12) and DPM-Solver++(2M) (Lu et al. 2022,
    algorithm 2) are rows of this form, and z ~ N(0, I). Where the model learns its variance (Nichol &
    Dhariwal 2021, eq. 15), model_output has 2C channels, the second half v of the conditional output is in
    [-1, 1], and sigma is multiplied by exp((f * log_var_max + (1 - f) * log_var_min) / 2), f = (v + 1) / 2.

    x: x_t, float32 [B, C, ...]; the reference backend also takes float64 and then computes in it.
    model_output: [B, C, ...] or [B, 2C, ...], floating-point; all arithmetic is in x's dtype.
    row: StepCoefficients, or their 12 numbers.
    model_output_uncond: the unconditional output for classifier-free guidance, of model_output's shape.
    x0_prev: the previous step's x0, of x's shape; needed where row.coef_x0_prev is not 0.
    noise: z, of x's shape; by default philox_normal(x.shape, seed, sample_ids, stream).
    seed, sample_ids, stream: see `philox_normal`. Nothing is drawn where row.sigma is 0.
    backend: "auto", "cuda", "cpp", "triton" or "reference"; only the reference is differentiable.

    ValueError: shapes, dtypes or devices do not fit, or the backend cannot serve this call.
    TypeError: an argument is not a tensor, an integer or a row, where it must be.
    """
    return op(
        Arguments(x, model_output, row, model_output_uncond, x0_prev, noise, seed, sample_ids, stream),
        backend,
    )


def _example(device: str) -> Arguments:
    x = torch.zeros(2, 3, 8, 8, device=device)
    return Arguments(x, x, StepCoefficients(*[0.0] * ROW_LENGTH))


def _example_in_place(device: str) -> InPlaceArguments:
    x = torch.zeros(2, 3, 8, 8, device=device)
    table = torch.zeros(1, ROW_LENGTH, dtype=torch.float64, device=device)
    ids = torch.arange(2, device=device)
    return InPlaceArguments(x, x, table, step_counter(0, device=device), ids)


OPS = (
    PublicOp(reverse_step, op, Arguments, _example),
    PublicOp(reverse_step_, op_in_place, InPlaceArguments, _example_in_place),
)
INTERNAL = (
    InternalOp("step_embeddings_", "the sampling loop"),
    InternalOp("copy_dense_", "the sampling loop"),
)
