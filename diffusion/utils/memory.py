"""The memory of devices: how much there is, how much is free, and whether a computation fits."""

import ctypes
import os
import sys
from pathlib import Path

import torch


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory of the device, or of the machine for the CPU; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_memory(device: torch.device) -> int | None:
    """Free bytes on the device, with those that PyTorch has cached, or None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def check_fits(what: str, size: int, device: torch.device) -> None:
    """ValueError, naming `what`, if `size` bytes are more than the device has."""
    total = total_memory(device)
    if total is not None and size > total:
        raise ValueError(f"{what} take {size / 2**30:,.0f} GiB, and {device} has {total / 2**30:,.0f} GiB")


def amount(size: float) -> str:
    """A number of bytes in words, such as "12 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:,.0f} GiB"


def keep_freed_memory() -> None:
    """Makes glibc keep large blocks that the process frees, instead of returning them to the system.

    A block that is returned and taken again costs a page fault for each page: 40,000 in a training step of
    the cifar10-ddpm recipe with 16 images, a twentieth of its time. With another C library nothing changes.
    """
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and (mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)):
        mallopt(trim_threshold, 2**31 - 1)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that an allocation failed, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    texts = ("DefaultCPUAllocator", "bad_alloc")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
