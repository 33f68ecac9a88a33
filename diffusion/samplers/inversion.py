"""DDIM inversion: a step table that leads from an image to the noise from which DDIM makes it."""

import math

import torch

from ..kernels import StepCoefficients
from ..utils.validation import whole_number
from .table import StepTable


def inverse(table: StepTable, iterations: int) -> StepTable:
    """The steps of DDIM (Song et al. 2021, arXiv 2010.02502, section 4.3) backwards, from x_0 to noise.

    table: of `ddim` with eta 0 and without clipping; each of its steps is x' = p x + q out(x, t). Backwards,
    x is the solution of x = (x' - q out(x, t)) / p, which is found by fixed-point iterations from x = x'
    (Pan et al. 2023, arXiv 2309.04907): the next x is x + q / p (out_before - out), and the first is
    x' / p - q / p out. One iteration is DDIM inversion as usual; more of them lead closer to the solution.

    iterations: evaluations of the network in each step, 1 or more. The x0 of a row is the network's output.
    ValueError for a table whose steps are not of that form.
    """
    iterations = whole_number("iterations", iterations, 1)
    column = {name: torch.tensor(table.column(name), dtype=torch.float64, device="cpu") for name in _USED}
    if column["sigma"].any() or table.needs_x0_prev or (column["clip_x0"] < math.inf).any():
        raise ValueError("only steps of ddim with eta=0 and clip=None can be inverted")
    p = column["coef_x"] + column["coef_x0"] * column["x0_from_x"]
    q = column["coef_output"] + column["coef_x0"] * column["x0_from_output"]
    if (p.abs() < 1e-12).any():
        raise ValueError(
            "a model that predicts the sample cannot be inverted: its last step keeps nothing of x"
        )
    first = torch.arange(len(p) * iterations, device="cpu") % iterations == 0
    p, q = (values.flip(0).repeat_interleave(iterations) for values in (p, q))
    rows = torch.zeros(len(p), len(StepCoefficients._fields), dtype=torch.float64, device="cpu")
    for name, values in {
        "timestep": column["timestep"].flip(0).repeat_interleave(iterations),
        "guidance_scale": column["guidance_scale"].flip(0).repeat_interleave(iterations),
        "x0_from_output": torch.ones_like(p),
        "clip_x0": torch.full_like(p, math.inf),
        "coef_x": torch.where(first, 1 / p, 1.0),
        "coef_x0": -q / p,
        "coef_x0_prev": torch.where(first, 0.0, q / p),
    }.items():
        rows[:, StepCoefficients._fields.index(name)] = values
    alphas, sigmas = (values.flip(0).repeat_interleave(iterations) for values in (table.alphas, table.sigmas))
    return StepTable(rows, alphas, sigmas)


_USED = (
    "timestep",
    "guidance_scale",
    "x0_from_x",
    "x0_from_output",
    "clip_x0",
    "coef_x",
    "coef_x0",
    "coef_output",
    "sigma",
)
