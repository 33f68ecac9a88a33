"""StepCoefficients: the numbers of one reverse step, and a row of a step table."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..._arguments import check_number
from ..._limits import ROW_LENGTH


class StepCoefficients(NamedTuple):
    """The numbers of one step of a sampler:

        out    = uncond + guidance_scale * (cond - uncond)
        x0     = clamp(x0_from_x * x + x0_from_output * out, -clip_x0, clip_x0)
        x_next = coef_x * x + coef_x0 * x0 + coef_x0_prev * x0_prev + coef_output * out + sigma * z

    with z ~ N(0, I); see `reverse_step`. timestep: x's, for the UNet; `reverse_step` does not need it.
    clip_x0: inf for no clipping. log_var_min, log_var_max: the logarithms between which a model with learned
    variance interpolates; sigma then multiplies the standard deviation that results.
    """

    timestep: float
    guidance_scale: float
    x0_from_x: float
    x0_from_output: float
    clip_x0: float
    coef_x: float
    coef_x0: float
    coef_x0_prev: float
    coef_output: float
    sigma: float
    log_var_min: float = 0.0
    log_var_max: float = 0.0


def as_coefficients(row: StepCoefficients | Sequence[float] | torch.Tensor) -> StepCoefficients:
    """`row` as StepCoefficients. ValueError for another number of entries, NaN, or a negative clip_x0.

    TypeError for anything that is not a sequence of real numbers.
    """
    if isinstance(row, StepCoefficients) and torch.compiler.is_compiling():  # its numbers are then symbols
        return row
    if not isinstance(row, StepCoefficients):
        values = row.tolist() if isinstance(row, torch.Tensor) else row
        if not isinstance(values, Sequence) or isinstance(values, str):
            raise TypeError(f"row must be the {ROW_LENGTH} numbers of StepCoefficients, not {row!r}")
        if len(values) != ROW_LENGTH or any(isinstance(v, list) for v in values):
            names = ", ".join(StepCoefficients._fields)
            raise ValueError(f"row has {len(values)} entries, not the {ROW_LENGTH} numbers {names}")
        for value in values:
            check_number("an entry of row", value)
        row = StepCoefficients(*(float(v) for v in values))
    if row.clip_x0 < 0:
        raise ValueError(f"row.clip_x0 must not be negative, and is {row.clip_x0}")
    if any(math.isnan(v) for v in row):
        raise ValueError(f"row holds NaN: {row}")
    return row
