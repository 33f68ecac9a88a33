"""Pool: memory for a plan's tensors, used again where the tensors before are no longer read."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes


class Pool:
    """Blocks of memory. A block is handed out, given back, and handed out again to one that fits."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self.bytes = 0  # of all blocks

    def take(self, size: int) -> Tensor:
        """A block of at least `size` bytes, uint8: a free one of at most twice the size, or a new one."""
        fitting = [block for block in self._free if size <= len(block) <= 2 * size]
        if fitting:
            block = min(fitting, key=len)
            self._free = [other for other in self._free if other is not block]
            return block
        size = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        self.bytes += size
        return torch.zeros(size, dtype=torch.uint8, device="cpu")

    def give_back(self, block: Tensor) -> None:
        self._free.append(block)


def shaped(block: Tensor, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A block as a tensor of this shape."""
    numbers = block[: math.prod(shape) * dtype.itemsize].view(dtype)
    return numbers.as_strided(tuple(shape), tuple(strides))
