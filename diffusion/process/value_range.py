"""The range of the values of a model's images, and the change from one range to another."""

import math
from typing import Any

import torch

from ..utils.validation import interval

SIGNED = (-1.0, 1.0)  # DDPM's


def check_range(name: str, value: Any) -> tuple[float, float]:
    """A range of values as two floats; ValueError unless it is two finite numbers, the smaller first."""
    low, high = interval(name, value)
    if not low < high < math.inf:
        raise ValueError(f"{name} must be two finite numbers, the smaller first, not {low:g} and {high:g}")
    return low, high


def change_range(x: torch.Tensor, old: tuple[float, float], new: tuple[float, float]) -> torch.Tensor:
    """Images with values in the range `old` mapped linearly to `new`; x itself if both are equal."""
    if old == new:
        return x
    scale = (new[1] - new[0]) / (old[1] - old[0])
    return x * scale + (new[0] - old[0] * scale)
