"""Type checks of op arguments."""

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def check_tensors(op: str, optional: Mapping[str, object] | None = None, **required: object) -> None:
    """TypeError unless every argument is a tensor; those of `optional` may be None."""
    for name, value in required.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, not {type(value).__name__}")
    for name, value in (optional or {}).items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor or None, not {type(value).__name__}")


def check_integer(name: str, value: Any) -> None:
    """TypeError unless `value` is an integer of Python, NumPy or a compiled graph, not a bool or tensor."""
    if isinstance(value, int) and not isinstance(value, bool):
        return
    try:
        if isinstance(value, Tensor | bool):
            raise TypeError
        operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None


def check_number(name: str, value: object) -> None:
    """TypeError unless `value` is a real number and not a tensor or bool. ValueError beyond floats' range."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 2**1023:
        raise ValueError(f"{name} must be a number that a float can hold")
    if isinstance(value, Tensor | bool) or not hasattr(type(value), "__float__"):
        raise TypeError(f"{name} must be a number, not {value!r}")
