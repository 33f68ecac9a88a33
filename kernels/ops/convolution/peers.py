"""The cases of conv2d and conv3x3, and the calls that replace them in plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._registry import Subject
from ..group_norm_silu.peers import group_norm_silu_of_torch
from . import winograd
from .arguments import Conv3x3Arguments
from .cases import CONV2D_BENCHMARKED, CONV2D_CASES, CONV3X3_BENCHMARKED, CONV3X3_CASES, Conv3x3Case
from .fused import pack_conv3x3
from .packing import PackedWeight


def _conv2d(
    case: object, x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int, padding: int
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding)


def _conv3x3_inputs(
    case: Conv3x3Case, dtype: torch.dtype, device: str, seed: int
) -> tuple[tuple, dict[str, Any]]:
    """The inputs of a case, with the weight packed for the size of the map."""
    (x, weight, bias), options = case.inputs(dtype, device, seed)
    factor = 2 if options["upsample"] else 1
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    height, width = x.shape[2:]
    packed = pack_conv3x3(weight, factor * height, factor * width, dtype)
    options = {name: t.to(dtype) if isinstance(t, Tensor) else t for name, t in options.items()}
    return (x, packed, None if bias is None else bias.to(dtype)), options


def _conv3x3(case: Conv3x3Case, *args: Any, **options: Any) -> Tensor:
    arguments = Conv3x3Arguments(*args, **options)
    norm = arguments.norm()
    h = arguments.x if norm is None else group_norm_silu_of_torch(case, *norm)
    if arguments.upsample:
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
    weight = arguments.weight
    plain = weight.weight if isinstance(weight, PackedWeight) else weight
    h = F.conv2d(h, plain, arguments.bias, padding=1)
    return h if arguments.residual is None else h + arguments.residual


SUBJECTS = {
    "conv2d": Subject(
        CONV2D_BENCHMARKED | CONV2D_CASES,
        _conv2d,
        tuple(CONV2D_BENCHMARKED),
        dtypes=(torch.float32, torch.bfloat16),
        differentiable=True,
        accuracy=lambda args: winograd.ACCURACY if args[0].dtype == torch.float32 else 0.0,
    ),
    "conv3x3": Subject(
        CONV3X3_BENCHMARKED | CONV3X3_CASES,
        _conv3x3,
        tuple(CONV3X3_BENCHMARKED),
        inputs=_conv3x3_inputs,
        accuracy=lambda args: args[1].accuracy,
    ),
}
