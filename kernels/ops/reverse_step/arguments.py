"""The arguments of reverse_step and reverse_step_, and which of them are valid."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._arguments import check_tensors
from ..philox.arguments import validate_counters
from .coefficients import ROW_LENGTH, StepCoefficients, as_coefficients


class Arguments(NamedTuple):
    """The arguments of reverse_step, except `backend`."""

    x: Tensor
    model_output: Tensor
    row: StepCoefficients | Sequence[float] | Tensor
    model_output_uncond: Tensor | None = None
    x0_prev: Tensor | None = None
    noise: Tensor | None = None
    seed: int = 0
    sample_ids: Tensor | Sequence[int] | None = None
    stream: int = 0


class InPlaceArguments(NamedTuple):
    """The arguments of reverse_step_, except `backend`."""

    x: Tensor
    model_output: Tensor
    table: Tensor
    counter: Tensor
    sample_ids: Tensor
    model_output_uncond: Tensor | None = None
    x0: Tensor | None = None
    noise: Tensor | None = None
    unet_input: Tensor | None = None


def _same(shape: Sequence[int], other: Sequence[int]) -> bool:
    if not torch.compiler.is_compiling():
        return shape == other
    # Sizes are compared one by one: for whole symbolic shapes torch.compile takes half a minute.
    return len(shape) == len(other) and all(m == n for m, n in zip(shape, other, strict=True))


def validate(arguments: Arguments) -> None:
    x, model_output, row, model_output_uncond, x0_prev, noise, seed, sample_ids, stream = arguments
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


def _overlaps(tensor: Tensor) -> bool:
    repeats = any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return repeats and tensor.numel() > 0


def validate_in_place(arguments: InPlaceArguments) -> None:
    x, model_output, table, counter, sample_ids, model_output_uncond, x0, noise, unet_input = arguments
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
