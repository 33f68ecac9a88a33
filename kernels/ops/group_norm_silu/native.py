"""The C++ and CUDA group_norm_silu: csrc/group_norm_silu/, one read and one write of x."""

import torch
from torch import Tensor

from ... import _native
from ..._limits import MAX_CUDA_GROUP_SIZE
from . import library
from .arguments import Arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _supports(arguments: Arguments) -> str | None:
    x = arguments.x
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    for name in ("weight", "bias", "add", "scale", "shift"):
        tensor = getattr(arguments, name)
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
    return None


def supports_cpp(arguments: Arguments) -> str | None:
    device = arguments.x.device
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device}"
    return _native.CPP_MISSING or _supports(arguments)


def supports_cuda(arguments: Arguments) -> str | None:
    x, num_groups = arguments.x, arguments.num_groups
    if x.device.type != "cuda":
        return f"it runs on CUDA devices, not on {x.device}"
    if x.shape[1] // num_groups > MAX_CUDA_GROUP_SIZE:
        return f"a group has {x.shape[1] // num_groups} channels, more than {MAX_CUDA_GROUP_SIZE}"
    return _native.CUDA_MISSING or _supports(arguments)


def group_norm_silu(arguments: Arguments) -> Tensor:
    x, *parameters, activation = arguments
    return torch.ops.fused_diffusion.group_norm_silu(
        library.as_supported_layout(x), *parameters, activation == "silu"
    )[0]
