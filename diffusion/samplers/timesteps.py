"""The timesteps of a schedule that a sampler visits."""

import itertools
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..process.schedule import NoiseSchedule
from ..utils.validation import choice, whole_number
from ..utils.words import counted

# sqrt(alphas_cumprod) where sampling starts, beyond that at T - 1. Above it, 2 % of the pixels in the bundled
# model's background are grey; at 0.7, nearly all.
MAX_SIGNAL = 0.2
SPACINGS = ("leading", "linspace", "trailing", "quad", "respaced", "truncated")
STRIDES = ("stride", "uniform")  # spacings with one whole stride, which not every number of steps has


def spaced_timesteps(
    T: int,
    steps: int | None = None,
    spacing: str = "leading",
    *,
    skip_zero: bool = False,
    steps_offset: int = 0,
    noisiest: int | None = None,
) -> torch.Tensor:
    """`steps` of the timesteps 0..T-1, int64 [steps], strictly decreasing; None or T means all of them.

    "leading": multiples of T // steps; "linspace": from T - 1 to 0; "trailing": from T - 1 in strides of
    T / steps (Lin et al. 2023, arXiv 2305.08891, table 2); "quad": floor(linspace(0, sqrt(0.8 T))^2), closer
    together near 0 (Song et al. 2021, arXiv 2010.02502, appendix D.2), and a repeated timestep is replaced by
    the next larger. A single step is at 0, except with trailing. Only trailing and linspace start at T - 1
    for any number of steps: with 501 steps of 1000, leading starts at 500.

    Other spacings are those of published code. "respaced" and "stride" are the timestep_respacing "N" and
    "ddimN" of improved-diffusion and guided-diffusion, for N steps: rounded multiples of
    (T - 1) / (steps - 1), added up in floating point, and multiples of the smallest whole stride that gives
    `steps` of them. Counts such as "10,15,20" are theirs, too: T is divided into as many sections, each
    respaced with its count, and steps is their sum or None. "uniform" has all multiples of T // steps, as in
    ermongroup/ddim, which can be more than `steps`. "truncated" is that of denoising-diffusion-pytorch:
    from T - 1 in strides of T / steps towards -1, truncated to whole numbers.

    skip_zero: leading and linspace space steps + 1 points and leave out the one at 0, as DPM-Solver++
    does in diffusers, because its last step goes to x_0 from any timestep. With all T timesteps there are
    no T + 1 points to space, and 0 is kept.

    steps_offset: at least 0, added to the timesteps of leading spacing. ValueError for steps outside 1..T or
    another spacing, where no stride gives so many steps, and for an offset that leads beyond T - 1.

    noisiest: leading, linspace and trailing start at this timestep instead of T - 1, in diffusers' way:
    trailing keeps its stride, so it has fewer steps.
    """
    if isinstance(spacing, str) and re.fullmatch(r"[0-9]+(,[0-9]+)*", spacing):
        return _descending(_sections(T, steps, spacing))
    choice("spacing", spacing, (*SPACINGS, *STRIDES))
    steps = T if steps is None else whole_number("steps", steps, 1, T)
    increasing: np.ndarray
    if spacing == "respaced":
        return _descending(_respaced(T, [steps]))
    end = T if noisiest is None else noisiest + 1
    if steps == T:
        increasing = np.arange(end)
    elif spacing == "trailing":
        # In floating point, arange can have one point too many, near 0.
        increasing = np.arange(end, 0, -T / steps)[:steps][::-1].round() - 1
        increasing = increasing[increasing >= 0]
    elif spacing == "truncated":
        # In float32, as published, because a timestep that is nearly whole is truncated to the one below.
        increasing = torch.linspace(-1, T - 1, steps + 1, device="cpu", dtype=torch.float32)[1:].int().numpy()
    elif spacing == "stride":
        increasing = np.arange(0, T, _smallest_stride(T, steps))
    elif spacing == "uniform":
        increasing = np.arange(0, T, T // steps)
    elif spacing == "quad":
        increasing = np.floor(np.linspace(0, np.sqrt(0.8 * T), steps) ** 2)
        index = np.arange(steps)
        increasing = np.maximum.accumulate(increasing - index) + index
    else:
        points = steps + skip_zero
        if points > end:
            raise ValueError(
                f"there are no {counted(steps, 'timestep')} below {end} to take; take fewer steps"
            )
        multiples = np.arange(points) * (end // points)
        increasing = multiples if spacing == "leading" else np.linspace(0, end - 1, points).round()
        increasing = increasing[skip_zero:]
    if spacing == "leading":
        increasing = increasing + whole_number("steps_offset", steps_offset, 0)
        if increasing[-1] >= T:
            raise ValueError(
                f"steps_offset {steps_offset} with {counted(steps, 'step')} leads to timestep "
                f"{increasing[-1]:.0f}, "
                f"beyond the last, {T - 1}; take fewer steps, or steps_offset=0"
            )
    return _descending(increasing)


def _descending(increasing: Sequence[int] | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(increasing)[::-1].astype(np.int64))


def _sections(T: int, steps: int | None, spacing: str) -> list[int]:
    """The timesteps of sections with the counts in `spacing`, such as "10,15,20"."""
    counts = [int(count) for count in spacing.split(",")]
    if sum(counts) == 0 or steps not in (None, sum(counts)):
        raise ValueError(
            f"spacing {spacing!r} has {counted(sum(counts), 'step')}, not {steps or 'at least 1'}"
        )
    return _respaced(T, counts)


def _respaced(T: int, counts: list[int]) -> list[int]:
    """As many sections of 0..T-1 as there are counts, of nearly the same size, each with its count of
    timesteps from its first to its last."""
    timesteps: list[int] = []
    start, (size, longer) = 0, divmod(T, len(counts))
    for i, count in enumerate(counts):
        section = size + (i < longer)
        if count > section:
            raise ValueError(f"spacing cannot take {counted(count, 'timestep')} of a section of {section}")
        stride = (section - 1) / (count - 1) if count > 1 else 1.0
        # Sums, because a product rounds some halves to the other side.
        points = itertools.islice(itertools.accumulate(itertools.repeat(stride), initial=0.0), count)
        timesteps += [start + round(point) for point in points]
        start += section
    return timesteps


def _smallest_stride(T: int, steps: int) -> int:
    """The smallest stride with `steps` multiples in 0..T-1; ValueError if there is none."""
    strides = {-(-T // stride): stride for stride in range(T - 1, 0, -1)}
    if steps not in strides:
        nearest = sorted(strides, key=lambda count: abs(count - steps))[:2]
        raise ValueError(
            f"spacing 'stride' has no {steps} of {counted(T, 'timestep')}, because no whole "
            "stride gives so many; "
            f"the nearest numbers of steps are {' and '.join(map(str, sorted(nearest)))}"
        )
    return strides[steps]


class SpacingWarning(UserWarning):
    """Sampling starts, from pure noise, at a timestep whose images have signal. Warns once per process."""


_warned = False


def visited_timesteps(
    schedule: NoiseSchedule, steps: int | None, spacing: str, strength: float, **how: Any
) -> torch.Tensor:
    """`spaced_timesteps`; warns of a start too far below T - 1, unless images are given for it."""
    global _warned
    timesteps = spaced_timesteps(schedule.T, steps, spacing, **how)
    first = int(timesteps[0])
    signal, at_end = schedule.alphas_cumprod[[first, -1]].sqrt().tolist()
    if not _warned and signal - at_end > MAX_SIGNAL and strength == 1:
        _warned = True
        warnings.warn(
            f"spacing {spacing!r} with steps={len(timesteps)} starts at timestep {first} of "
            f"0..{schedule.T - 1}. Images there have a signal of {signal:.0%}, the initial noise has none, "
            "and samples turn out grey. Use spacing='trailing', which starts at the last timestep",
            SpacingWarning,
            stacklevel=3,
        )
    return timesteps
