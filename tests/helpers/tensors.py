"""Tensors of one kind: a call in another dtype or on another device, and images in channels_last."""

from typing import Any

import torch


def cast(
    args: tuple, kwargs: dict[str, Any], dtype: torch.dtype | None = None, device: str | None = None
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call, with its floating-point tensors in `dtype` and all its tensors on `device`."""

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

    return tuple(map(one, args)), {name: one(value) for name, value in kwargs.items()}


def channels_last(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normals, the same for one seed."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)
