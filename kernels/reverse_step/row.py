"""The twelve numbers of one reverse step."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


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
    """`row` as a Row; ValueError unless it is 12 numbers in Row's order, none NaN, clip not negative."""
    if isinstance(row, Row) and torch.compiler.is_compiling():  # its numbers are then symbols
        return row
    if not isinstance(row, Row):
        values = row.tolist() if isinstance(row, torch.Tensor) else list(row)
        if len(values) != len(Row._fields) or any(isinstance(v, list) for v in values):
            raise ValueError(f"row has {len(values)} entries, not the 12 numbers {', '.join(Row._fields)}")
        row = Row(*(float(v) for v in values))
    if row.clip < 0:
        raise ValueError(f"row.clip must not be negative, and is {row.clip}")
    if any(math.isnan(v) for v in row):
        raise ValueError(f"row holds NaN: {row}")
    return row
