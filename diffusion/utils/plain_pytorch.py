"""Tells that plain PyTorch computes where this package's library for the CPU is missing."""

import functools
import warnings

import torch

from ..kernels import _native

REMEDY = "install a C++17 compiler and Python's headers, and then fused-diffusion again"


def tell_of_plain_pytorch(device: torch.device) -> None:
    """A UserWarning, once in a process, where the CPU computes without the compiled library."""
    if device.type == "cpu" and _native.CPP_MISSING is not None:
        _tell(_native.CPP_MISSING)


@functools.cache
def _tell(reason: str) -> None:
    remedy = "" if "run: pip install" in reason else f"; {REMEDY}"
    warnings.warn(f"plain PyTorch computes here, which is slower: {reason}{remedy}", stacklevel=4)
