"""Compares what a plan returns with what the module returns, to find a plan that is wrong.

The bounds are far above what rounding gives, and below what another branch of the module's code, a skipped
step or a wrong operand gives.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

LARGEST_ERROR = 1e-2  # root mean square, relative, in float32
LARGEST_NARROW_ERROR = 0.25  # in 16 bits
MOST_UNEQUAL = 1e-2  # share of truth values or indices, which rounding can change


def difference(expected: Any, actual: Any, narrow: bool) -> str | None:
    """How a plan's result differs from the module's beyond rounding, as a clause; None if it does not.

    narrow: the plan may compute in 16 bits. Numbers that are not finite in `expected` are not compared, and
    an error of 1e-6 passes, whatever the size of the numbers.
    """
    leaves, structure = pytree.tree_flatten(expected)
    others, other_structure = pytree.tree_flatten(actual)
    if len(leaves) != len(others) or structure != other_structure:
        return "of another structure"
    for one, other in zip(leaves, others, strict=True):
        if isinstance(one, Tensor) != isinstance(other, Tensor):
            return "of another type"
        if not isinstance(one, Tensor):
            if one != other and one == one:  # a NaN is unequal to itself
                return f"{other!r} instead of {one!r}"
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            found, wanted = (f"{list(t.shape)} of {t.dtype}" for t in (other, one))
            return f"{found} instead of {wanted}"
        if not _is_near(one, other, narrow):
            return "further off than rounding gives"
    return None


def _is_near(expected: Tensor, actual: Tensor, narrow: bool) -> bool:
    if not expected.is_floating_point():
        few = (expected != actual).count_nonzero().item() <= MOST_UNEQUAL * expected.numel()
        if few or expected.dtype == torch.bool:
            return few
    kept = expected.isfinite()
    a, b = expected[kept], actual[kept]
    if not a.is_complex():
        a, b = a.double(), b.double()
    largest = LARGEST_NARROW_ERROR if narrow or expected.dtype.itemsize < 4 else LARGEST_ERROR
    scale = max(a.abs().max().item(), 1e-30) if a.numel() else 1.0  # so that no square overflows
    error, size = (torch.linalg.vector_norm(t / scale).item() for t in (a - b, a))
    return error <= largest * size + 1e-6 * a.numel() ** 0.5 / scale
