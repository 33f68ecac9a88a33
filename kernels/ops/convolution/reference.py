"""conv2d and conv3x3 in plain PyTorch, the truth for every other backend."""

import torch
import torch.nn.functional as F

from ..group_norm_silu.reference import group_norm_silu
from .arguments import Conv2dArguments, Conv3x3Arguments
from .packing import PackedWeight


def conv2d(arguments: Conv2dArguments) -> torch.Tensor:
    x, weight, bias, stride, padding = arguments
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def conv3x3(arguments: Conv3x3Arguments) -> torch.Tensor:
    h, weight, bias, residual = arguments.x, arguments.weight, arguments.bias, arguments.residual
    if isinstance(weight, PackedWeight):
        weight = weight.weight
    norm = arguments.norm()
    if norm is not None:
        h = group_norm_silu(norm)
    bias = None if bias is None else bias.to(h.dtype)
    if 0 in (len(weight), *h.shape[2:]):  # PyTorch's ops refuse empty maps and no outputs
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3) if arguments.upsample else h
        h = torch.einsum("nchw,kcij->nkhw", h, weight.to(h.dtype))
        h = h if bias is None else h + bias[:, None, None]
    else:
        h = F.interpolate(h, scale_factor=2.0, mode="nearest") if arguments.upsample else h
        h = F.conv2d(h, weight.to(h.dtype), bias, padding=1)
    return h if residual is None else h + residual.to(h.dtype)
