"""The twelve numbers of one reverse step."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..._arguments import check_number


class Row(NamedTuple):
    """One step of any sampler that is affine in (x, x0, x0_prev, out, z); see `reverse_step`.

    `clip` is inf for no clipping; the log-variances matter only where the model learns its variance.
    """

    timestep: float
    guidance_scale: float
    p_x: float
    p_o: float
    clip: float
    a: float
    b: float
    d: float
    e: float
    s: float
    log_var_min: float = 0.0
    log_var_max: float = 0.0


def as_row(row: Row | Sequence[float] | torch.Tensor) -> Row:
    """`row` as a Row; ValueError unless it is 12 numbers in Row's order, none NaN, clip not negative.

    TypeError for what is no sequence of real numbers.
    """
    if isinstance(row, Row) and torch.compiler.is_compiling():  # its numbers are then symbols
        return row
    if not isinstance(row, Row):
        values = row.tolist() if isinstance(row, torch.Tensor) else row
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise TypeError(f"row must be the 12 numbers of a Row, not {row!r}")
        if len(values) != len(Row._fields) or any(isinstance(v, list) for v in values):
            raise ValueError(f"row has {len(values)} entries, not the 12 numbers {', '.join(Row._fields)}")
        for value in values:
            check_number("an entry of row", value)
        row = Row(*(float(v) for v in values))
    if row.clip < 0:
        raise ValueError(f"row.clip must not be negative, and is {row.clip}")
    if any(math.isnan(v) for v in row):
        raise ValueError(f"row holds NaN: {row}")
    return row
