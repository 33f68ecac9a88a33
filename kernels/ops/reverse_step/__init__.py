"""One step of the reverse process, for every sampler."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._arguments import check_tensors
from ..._dispatch import Backend, Op, always
from ..philox import validate_counters
from . import native, reference, triton_launch
from .coefficients import ROW_LENGTH, StepCoefficients, as_coefficients

__all__ = ["ROW_LENGTH", "StepCoefficients", "as_coefficients", "op", "reverse_step"]


def _same(shape, other) -> bool:
    if not torch.compiler.is_compiling():
        return shape == other
    # Size by size: whole symbolic shapes compared at once cost torch.compile half a minute.
    return len(shape) == len(other) and all(m == n for m, n in zip(shape, other, strict=True))


def _validate(x, model_output, row, *, model_output_uncond, x0_prev, noise, seed, sample_ids, stream):
    optional = {"model_output_uncond": model_output_uncond, "x0_prev": x0_prev, "noise": noise}
    check_tensors("reverse_step", optional, x=x, model_output=model_output)
    if x.dim() < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is a {x.dim()}-dimensional {x.dtype} tensor, not float32 or float64 [B, C, ...]")
    fits = _same(model_output.shape, x.shape)
    if not fits:
        learned = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
        fits = _same(model_output.shape, learned)
    if not fits or not model_output.is_floating_point():
        raise ValueError(
            f"model_output is {model_output.dtype} {tuple(model_output.shape)}, not floating-point "
            f"{tuple(x.shape)}, or [B, 2C, ...] with learned variance"
        )
    for name, tensor, like, whose in (
        ("model_output", model_output, model_output, "model_output"),
        ("model_output_uncond", model_output_uncond, model_output, "model_output"),
        ("x0_prev", x0_prev, x, "x"),
        ("noise", noise, x, "x"),
    ):
        if tensor is None:
            continue
        if not _same(tensor.shape, like.shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {whose}'s {tuple(like.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, not on x's {x.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, not floating-point")
    if as_coefficients(row).coef_x0_prev != 0 and x0_prev is None:
        raise ValueError("row.coef_x0_prev is not 0, so x0_prev (the previous step's x0) is needed")
    validate_counters(x.shape, seed=seed, sample_ids=sample_ids, stream=stream)


op = Op(
    "reverse_step",
    {
        "cuda": Backend(native.reverse_step, native.supports_cuda),
        "cpp": Backend(native.reverse_step, native.supports_cpp),
        "triton": Backend(triton_launch.reverse_step, triton_launch.supports),
        "reference": Backend(reference.reverse_step, always),
    },
    _validate,
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
    TypeError: what is no tensor, integer or row.
    """
    return op(
        x,
        model_output,
        row,
        model_output_uncond=model_output_uncond,
        x0_prev=x0_prev,
        noise=noise,
        seed=seed,
        sample_ids=sample_ids,
        stream=stream,
        backend=backend,
    )
