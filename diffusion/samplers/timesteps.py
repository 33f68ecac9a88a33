"""Which of a schedule's timesteps a sampler visits."""

import numpy as np
import torch

from ..utils.validation import choice, whole_number

SPACINGS = ("leading", "linspace", "trailing", "quad")


def spaced_timesteps(
    T: int, steps: int | None = None, spacing: str = "leading", *, skip_zero: bool = False
) -> torch.Tensor:
    """`steps` of the timesteps 0..T-1, int64 [steps], strictly decreasing; None or T means all of them.

    "leading": multiples of T // steps; "linspace": from T - 1 to 0; "trailing": from T - 1 in strides of
    T / steps (Lin et al. 2023, arXiv 2305.08891, table 2); "quad": floor(linspace(0, sqrt(0.8 T))^2), closer
    together near 0 (Song et al. 2021, arXiv 2010.02502, appendix D.2), where it repeats a timestep the next
    larger one. A single step is at 0, except with trailing. Only trailing and linspace start at T - 1 for all
    steps: leading starts at 500 of 1000 with 501 steps.

    skip_zero: leading and linspace space steps + 1 points and leave out the one at 0, as DPM-Solver++
    does in diffusers, because its last step goes to x_0 from any timestep. Where all timesteps are asked for,
    there are no T + 1 points to space, and 0 is kept. ValueError for steps outside 1..T or another spacing.
    """
    choice("spacing", spacing, SPACINGS)
    steps = T if steps is None else whole_number("steps", steps, 1, T)
    if steps == T:
        increasing = np.arange(T)
    elif spacing == "trailing":
        # In floating point, arange can have one point too many, near 0.
        increasing = np.arange(T, 0, -T / steps)[:steps][::-1].round() - 1
    elif spacing == "quad":
        increasing = np.floor(np.linspace(0, np.sqrt(0.8 * T), steps) ** 2)
        index = np.arange(steps)
        increasing = np.maximum.accumulate(increasing - index) + index
    else:
        points = steps + skip_zero
        multiples = np.arange(points) * (T // points)
        increasing = multiples if spacing == "leading" else np.linspace(0, T - 1, points).round()
        increasing = increasing[skip_zero:]
    return torch.from_numpy(increasing[::-1].astype(np.int64))
