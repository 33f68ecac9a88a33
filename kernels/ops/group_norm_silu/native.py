"""The C++ and CUDA group_norm_silu: csrc/group_norm_silu/, one read and one write of x."""

import torch
from torch import Tensor

from ... import _native
from ..._limits import MAX_CUDA_GROUP_SIZE
from . import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(x: Tensor, **parameters: Tensor | None) -> str | None:
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    for name, tensor in parameters.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
        if tensor is not None and tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    return None


def supports_cpp(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on the CPU, not on {x.device}"
    return _native.CPP_MISSING or _supports(x, weight=weight, bias=bias, add=add, scale=scale, shift=shift)


def supports_cuda(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on CUDA devices, not on {x.device}"
    if x.shape[1] // num_groups > MAX_CUDA_GROUP_SIZE:
        return f"a group has {x.shape[1] // num_groups} channels, more than {MAX_CUDA_GROUP_SIZE}"
    return _native.CUDA_MISSING or _supports(x, weight=weight, bias=bias, add=add, scale=scale, shift=shift)


def group_norm_silu(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
) -> Tensor:
    return torch.ops.fused_diffusion.group_norm_silu(
        library.in_a_layout(x), num_groups, weight, bias, eps, add, scale, shift, activation == "silu"
    )[0]
