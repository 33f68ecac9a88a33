"""The rate of large matrix products, with which the rates of networks and of training steps are compared."""

from collections.abc import Callable
from functools import partial

import torch

SIZES = (1024, 2048, 4096)  # sides of the square matrices


def matrix_rate(
    dtype: torch.dtype, seconds: Callable[[Callable[[], object]], float], device: str = "cpu"
) -> float:
    """FLOP per second of PyTorch's product of two square matrices, of the size with the highest rate.

    seconds: times a function, by the clock of the caller's other figures.
    """
    rates = []
    for size in SIZES:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates.append(2 * size**3 / seconds(partial(torch.mm, a, b)))
    return max(rates)
