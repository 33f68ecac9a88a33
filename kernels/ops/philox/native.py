"""The C++ and CUDA normals: csrc/philox/."""

import torch
from torch import Tensor

from ... import _native
from .arguments import Arguments
from .library import operator_arguments


def supports_cpp(arguments: Arguments) -> str | None:
    if torch.device(arguments.device).type != "cpu":
        return f"it runs on the CPU, not on {arguments.device}"
    return _native.CPP_MISSING


def supports_cuda(arguments: Arguments) -> str | None:
    if torch.device(arguments.device).type != "cuda":
        return f"it runs on CUDA devices, not on {arguments.device}"
    return _native.CUDA_MISSING


def philox_normal(arguments: Arguments) -> Tensor:
    inputs = operator_arguments(arguments)
    return torch.ops.fused_diffusion.philox_normal(*inputs).reshape(arguments.shape)
