"""One step of the reverse process where it happens: in the buffers of a sampler that runs a whole table."""

import torch
from torch import Tensor

from ..._arguments import check_tensors
from ..._dispatch import Backend, Op, always
from ..philox import validate_counters
from . import native, reference, triton_launch
from .coefficients import ROW_LENGTH


def step_counter(seed: int, *, stream: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """The state of `reverse_step_` before its first step: int64 [4] on `device`.

    It holds the step, seed in [0, 2**64), the noise stream of step 0, in [0, 2**32), and a 0 of its own.
    """
    validate_counters((0,), seed=seed, sample_ids=None, stream=stream)
    return native.step_counter(seed, stream, device)


def _overlaps(tensor: Tensor) -> bool:
    repeats = any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return repeats and tensor.numel() > 0


def _validate(x, model_output, table, counter, *, sample_ids, model_output_uncond, x0, noise, unet_input):
    optional = {
        "model_output_uncond": model_output_uncond,
        "x0": x0,
        "noise": noise,
        "unet_input": unet_input,
    }
    required = {"table": table, "counter": counter, "sample_ids": sample_ids}
    check_tensors("reverse_step_", optional, x=x, model_output=model_output, **required)
    if x.dim() < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x is a {x.dim()}-dimensional {x.dtype} tensor, not float32 or float64 [B, C, ...]")
    batch, device = x.shape[0], x.device
    for name, tensor, shape, multiples in (
        ("model_output", model_output, x.shape, (1, 2)),
        ("model_output_uncond", model_output_uncond, model_output.shape, ()),
        ("x0", x0, x.shape, ()),
        ("noise", noise, x.shape, ()),
        ("unet_input", unet_input, x.shape, (2, 1)),
        ("table", table, (*table.shape[:1], ROW_LENGTH), ()),
        ("counter", counter, (4,), ()),
        ("sample_ids", sample_ids, (batch,), ()),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            allowed = [tuple(shape)]
            if multiples:
                allowed.append((multiples[0] * shape[0], multiples[1] * shape[1], *shape[2:]))
            if tuple(tensor.shape) not in allowed:
                wanted = " or ".join(map(str, allowed))
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {wanted}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, not on x's {device}")
    for name, tensor, dtype in (
        ("table", table, torch.float64),
        ("counter", counter, torch.int64),
        ("sample_ids", sample_ids, torch.int64),
    ):
        if tensor.dtype != dtype or not tensor.is_contiguous():
            found = f"{'' if tensor.is_contiguous() else 'strided '}{tensor.dtype}"
            raise ValueError(f"{name} must be contiguous {dtype}, not {found}")
    for name, tensor in (("model_output", model_output), *optional.items()):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}, not floating-point")
    for name, tensor in (("x", x), ("x0", x0), ("unet_input", unet_input)):
        if tensor is not None and _overlaps(tensor):
            raise ValueError(f"{name} is written to, and so must not be expanded from fewer elements")


op = Op(
    "reverse_step_",
    {
        "cuda": Backend(native.reverse_step_, native.supports_cuda_in_place),
        "cpp": Backend(native.reverse_step_, native.supports_cpp_in_place),
        "triton": Backend(triton_launch.reverse_step_, triton_launch.supports_in_place),
        "reference": Backend(reference.reverse_step_, always),
    },
    _validate,
)


def reverse_step_(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    counter: Tensor,
    *,
    sample_ids: Tensor,
    model_output_uncond: Tensor | None = None,
    x0: Tensor | None = None,
    noise: Tensor | None = None,
    unet_input: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """`reverse_step` by row counter[0] of a table, in place, and the next input of the UNet with it.

    Row and counter are read where the kernel runs, and the counter then goes on by one, so a captured CUDA
    graph of this call and a UNet is a whole sampler.

    x: x_t on entry, x_{t-1} on return; contiguous float32 [B, C, ...] (the reference: or float64).
    model_output, model_output_uncond: as in `reverse_step`; contiguous or channels_last, and alike.
    table: float64 [rows, 12], StepCoefficients in each row.
    counter: see `step_counter`. Step i draws from the noise stream of step 0 plus i.
    sample_ids: int64 [B].
    x0: the previous step's x0 on entry, which matters where row.coef_x0_prev is not 0; this step's on return.
    noise: z of this step, instead of the counter-based noise.
    unet_input: is overwritten with x_{t-1}, in its dtype and layout: [B, C, ...], or [2B, C, ...] for
        x_{t-1} twice, as guidance needs it.
    backend: "auto", "cuda", "cpp", "triton" or "reference".

    ValueError: shapes, dtypes or devices do not fit, or the backend cannot serve this call.
    RuntimeError: the counter is at no row, or the row needs an x0 that is None. On a device, where
        nothing can raise, such a step gives NaN.
    """
    op(
        x,
        model_output,
        table,
        counter,
        sample_ids=sample_ids,
        model_output_uncond=model_output_uncond,
        x0=x0,
        noise=noise,
        unet_input=unet_input,
        backend=backend,
    )
