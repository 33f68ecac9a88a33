"""How much memory a device has."""

import os
from pathlib import Path

import torch


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device, or of the machine for the CPU; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_memory(device: torch.device) -> int | None:
    """Bytes of the device that nobody holds; None where nobody tells."""
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


def is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says that an allocation failed, on any device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = ("DefaultCPUAllocator", "bad_alloc")
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)
