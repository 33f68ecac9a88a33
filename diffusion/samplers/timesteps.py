"""The timesteps of a schedule that a sampler visits."""

import warnings

import numpy as np
import torch

from ..process.schedule import NoiseSchedule
from ..utils.validation import choice, whole_number

# sqrt(alphas_cumprod) where sampling starts, beyond that at T - 1. Above it, 2 % of the pixels in the bundled
# model's background are grey; at 0.7, nearly all.
MAX_SIGNAL = 0.2
SPACINGS = ("leading", "linspace", "trailing", "quad")


def spaced_timesteps(
    T: int, steps: int | None = None, spacing: str = "leading", *, skip_zero: bool = False
) -> torch.Tensor:
    """`steps` of the timesteps 0..T-1, int64 [steps], strictly decreasing; None or T means all of them.

    "leading": multiples of T // steps; "linspace": from T - 1 to 0; "trailing": from T - 1 in strides of
    T / steps (Lin et al. 2023, arXiv 2305.08891, table 2); "quad": floor(linspace(0, sqrt(0.8 T))^2), closer
    together near 0 (Song et al. 2021, arXiv 2010.02502, appendix D.2), and a repeated timestep is replaced by
    the next larger. A single step is at 0, except with trailing. Only trailing and linspace start at T - 1
    for any number of steps: with 501 steps of 1000, leading starts at 500.

    skip_zero: leading and linspace space steps + 1 points and leave out the one at 0, as DPM-Solver++
    does in diffusers, because its last step goes to x_0 from any timestep. With all T
    timesteps there are no T + 1 points to space, and 0 is kept. ValueError for steps outside 1..T or another
    spacing.
    """
    choice("spacing", spacing, SPACINGS)
    steps = T if steps is None else whole_number("steps", steps, 1, T)
    increasing: np.ndarray
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


class SpacingWarning(UserWarning):
    """Sampling starts, from pure noise, at a timestep whose images have signal. Warns once per process."""


_warned = False


def visited_timesteps(schedule: NoiseSchedule, steps: int | None, spacing: str, **how: bool) -> torch.Tensor:
    """`spaced_timesteps`; warns of a start too far below T - 1."""
    global _warned
    timesteps = spaced_timesteps(schedule.T, steps, spacing, **how)
    first = int(timesteps[0])
    signal, at_end = schedule.alphas_cumprod[[first, -1]].sqrt().tolist()
    if not _warned and signal - at_end > MAX_SIGNAL:
        _warned = True
        warnings.warn(
            f"spacing {spacing!r} with steps={len(timesteps)} starts at timestep {first} of "
            f"0..{schedule.T - 1}. Images there have a signal of {signal:.0%}, the initial noise has none, "
            "and samples turn out grey. Use spacing='trailing', which starts at the last timestep",
            SpacingWarning,
            stacklevel=3,
        )
    return timesteps
