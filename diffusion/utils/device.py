"""Devices and dtypes by name, whether this machine has them, and how they multiply."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from ..kernels._native import allows
from ..kernels.ops.convolution.native import multiplies_bf16_pairs
from .errors import first_line
from .validation import choice, shown

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")  # of the kernels
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of this name; ValueError if this machine or this PyTorch does not have it."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        hint = (
            "; a GPU of NVIDIA or AMD is 'cuda'"
            if re.match(r"\W*(gpu|nvidia|amd|rocm)", str(device), re.I)
            else ""
        )
        raise ValueError(
            f"there is no device {shown(device)}; this machine has: {devices()}{hint}"
        ) from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise ValueError(f"there is no device {str(device)!r} here: {first_line(error)}") from error
    if device.type == "meta":
        raise ValueError("the meta device holds no data; choose a real one, such as cpu")
    return torch.empty(0, device=device).device


def devices() -> str:
    """The devices that this PyTorch finds here, such as "cpu, cuda"."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return ", ".join(name for name, available in found.items() if available)


def check_backend(backend: str) -> str:
    """The backend of the kernels if it is the name of one; ValueError otherwise."""
    hint = '; device="cuda" computes on a GPU' if shown(backend).lower() in ("'gpu'", "'mps'") else ""
    return choice("backend", backend, BACKENDS, hint)


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """float32, bfloat16, float16 or float64, by name or as a torch.dtype; ValueError for others."""
    if isinstance(dtype, torch.dtype) and dtype in DTYPES.values():
        return dtype
    return DTYPES[choice("dtype", dtype, DTYPES)]


@cache
def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """ValueError if the device cannot run a UNet's operations in this dtype, which are tried once."""
    try:
        x = torch.zeros(1, 4, 4, 4, device=device, dtype=dtype)
        x = nn.functional.conv2d(x, torch.zeros(4, 4, 3, 3, device=device, dtype=dtype), padding=1)
        x = nn.functional.silu(nn.functional.group_norm(x, 2)).flatten(2)
        nn.functional.scaled_dot_product_attention(x[None], x[None], x[None]) @ x.mT
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise ValueError(f"device {device} lacks dtype {str(dtype)[6:]}: {first_line(error)}") from error


# Held while a setting of the whole process is another, or while a CUDA graph is captured.
EXCLUSIVE = threading.RLock()


@contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Within, PyTorch multiplies float32 on a CUDA device as float32 or, with tf32, rounded to TF32.

    By default PyTorch convolves in TF32, which has 10 bits of mantissa. These settings are the whole
    process's, so only one thread is within at a time; they return to what they were. On other devices nothing
    changes.
    """
    if device.type != "cuda":
        yield
        return
    backends: Any = torch.backends  # PyTorch's stubs lack some of these
    settings = (backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul)
    with EXCLUSIVE:
        before = [setting.fp32_precision for setting in settings]
        try:
            for setting in settings:
                setting.fp32_precision = "tf32" if tf32 else "ieee"
            yield
        finally:
            for setting, precision in zip(settings, before, strict=True):
                setting.fp32_precision = precision


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether this package's kernels multiply bfloat16 in hardware on the device, so that it is faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and multiplies_bf16_pairs()


def torch_multiplies_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch multiplies bfloat16 in hardware on the device; this needs no kernel of the package."""
    if device.type != "cpu":
        return multiplies_bfloat16(device)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(
        capabilities.get(name) and allows(variant)
        for name, variant in (("avx512_bf16", "avx512_bf16"), ("amx_bf16", "amx"))
    )
