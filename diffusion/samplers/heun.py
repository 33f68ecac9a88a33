"""Heun's sampler, of second order, over the noise levels of EDM or the timesteps of a schedule."""

import math
from dataclasses import replace
from inspect import signature
from typing import Annotated, Any

import torch
from torch import Tensor

from ..process.noise_levels import NoiseLevels
from ..process.prediction import check_x0_determined
from ..process.schedule import NoiseSchedule
from ..utils.validation import number, refuse, whole_number
from .table import StepTable, first_step, make_table, next_alphas_cumprod
from .timesteps import visited_timesteps

STEPS = 18  # of a process without timesteps, as in the paper's code
# From a higher noise level, as that of a cosine schedule's last timestep, the correction would multiply the
# difference of two predictions by thousands, and the image would be lost. The step is Euler's.
MAX_CORRECTED = 1000.0
MAX_CHURN = math.sqrt(2) - 1  # no step adds more noise than its image has


def heun(
    schedule: NoiseSchedule | NoiseLevels,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    strength: float = 1.0,
    sigma_min: Annotated[float, "EDM's lowest noise level above 0"] = 0.002,
    sigma_max: Annotated[float, "EDM's noise level of the start"] = 80.0,
    rho: Annotated[float, "exponent of the spacing of EDM's noise levels"] = 7.0,
    s_churn: Annotated[float, "amount of noise that is added to EDM's images, such as 40"] = 0.0,
    s_min: Annotated[float, "lowest noise level at which s_churn adds noise"] = 0.0,
    s_max: Annotated[float, "highest noise level at which s_churn adds noise"] = math.inf,
    s_noise: Annotated[float, "standard deviation of the noise of s_churn"] = 1.0,
) -> StepTable:
    """Heun's method (Karras et al. 2022, arXiv 2206.00364, algorithms 1 and 2).

    Each step but the last evaluates the network twice, and so the table has 2 * steps - 1 rows. The first is
    Euler's step from noise level s0 to s1, with the predicted image D0. The second predicts D1 there and adds
    (s0 - s1) / (2 s1) * (D1 - D0), which replaces the slope by the average of both, as algorithm 1 has it.
    The last step, which goes to x_0, is Euler's.

    With `NoiseLevels`, prediction_type is "sample", guidance_interval is in noise levels, spacing is not
    used, and

    steps: number of steps, 18 by default.
    sigma_min, sigma_max, rho: the levels are (sigma_max^(1/rho) + i / (steps - 1) (sigma_min^(1/rho) -
        sigma_max^(1/rho)))^rho for i = 0..steps-1 (eq. 5), within the range that the network knows. A single
        step starts at sigma_max.
    s_churn, s_min, s_max, s_noise: S_churn, S_tmin, S_tmax and S_noise of algorithm 2. Noise that it adds
        before the first step is part of the initial noise here.

    With a `NoiseSchedule`, a timestep has the noise level sqrt((1 - alphas_cumprod) / alphas_cumprod). A step
    from a level above 1,000 has no correction, which would be thousands of times a difference of predictions.
    The package's docstring has the other arguments. ValueError for an option that only the other process has.
    """
    shared: dict[str, Any] = {
        "clip": clip,
        "guidance_scale": guidance_scale,
        "guidance_interval": guidance_interval,
    }
    spaced = {"sigma_min": sigma_min, "sigma_max": sigma_max, "rho": rho}
    churn = {"s_churn": s_churn, "s_min": s_min, "s_max": s_max}
    if isinstance(schedule, NoiseSchedule):
        for name, value in (spaced | churn | {"s_noise": s_noise}).items():
            if value != signature(heun).parameters[name].default:
                raise ValueError(f"{name} is of continuous noise levels (EDM), and this model has timesteps")
        return _over_timesteps(schedule, steps, prediction_type, spacing, strength, **shared)
    if spacing != "leading":
        raise ValueError("spacing is of timesteps, and this model has continuous noise levels; choose rho")
    if prediction_type != "sample":
        refuse("prediction type", "'sample' for continuous noise levels", prediction_type)
    current = edm_levels(schedule, STEPS if steps is None else steps, **spaced)
    raised = _raised(schedule, current, **churn)
    added = number("s_noise", s_noise, 0) * (raised**2 - current**2).clamp(min=0).sqrt()
    start = torch.hypot(current[0], added[0]).item()
    following = torch.cat([current[1:], current.new_zeros(1)])
    ones = torch.ones_like(raised)
    rows: dict[str, Any] = _rows(raised, following, ones, ones)
    # The correction at s1 is followed by the noise that the next step begins with.
    rows["sigma"] = _interleaved(torch.zeros_like(added), added[1:])
    timesteps = _interleaved(raised, current[1:])
    first = 2 * first_step(len(current), strength)
    signal = torch.ones_like(timesteps)
    table = make_table(timesteps, signal, prediction_type, columns=rows, start=first, **shared)
    return replace(table, initial_scale=start, sigmas=timesteps[first:])


def edm_levels(process: NoiseLevels, steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """The noise levels of `heun`, float64 [steps], falling. ValueError for values out of range."""
    steps, rho = whole_number("steps", steps, 1, process.max_steps), number("rho", rho, above=0)
    low = max(number("sigma_min", sigma_min, above=0), process.sigma_min)
    high = min(number("sigma_max", sigma_max, above=0), process.sigma_max or math.inf)
    if low >= high:
        raise ValueError(f"sigma_min must be less than sigma_max, and they are {low:g} and {high:g}")
    share = torch.arange(steps, dtype=torch.float64, device="cpu") / max(steps - 1, 1)
    first, last = high ** (1 / rho), low ** (1 / rho)
    return process.nearest((first + share * (last - first)) ** rho)


def _raised(process: NoiseLevels, levels: Tensor, s_churn: float, s_min: float, s_max: float) -> Tensor:
    """The noise level at which each step evaluates the network, once noise was added (algorithm 2)."""
    low, high = number("s_min", s_min, 0), number("s_max", s_max, 0, infinite=True)
    gamma = min(number("s_churn", s_churn, 0) / len(levels), MAX_CHURN)
    inside = (levels >= low) & (levels <= high)
    return torch.where(inside, process.nearest(levels * (1 + gamma)), levels)


def _over_timesteps(
    schedule: NoiseSchedule,
    steps: int | None,
    prediction_type: str,
    spacing: str,
    strength: float,
    **shared: Any,
) -> StepTable:
    timesteps = visited_timesteps(schedule, steps, spacing, strength)
    start = first_step(len(timesteps), strength)
    current = schedule.alphas_cumprod[timesteps]
    check_x0_determined(prediction_type, current[start:])
    # The noise level of zero SNR is infinite; see `dpm_solver`.
    finite = torch.where(current > 0, current, (next_alphas_cumprod(current) / 2).clamp(max=2**-24))
    following = next_alphas_cumprod(finite)
    levels, next_levels = (((1 - a) / a).sqrt() for a in (finite, following))
    rows: dict[str, Any] = _rows(levels, next_levels, finite.sqrt(), following.sqrt())
    uncorrected = _interleaved(torch.zeros_like(levels), (levels > MAX_CORRECTED)[:-1].double()).bool()
    rows |= {name: rows[name].masked_fill(uncorrected, 0.0) for name in ("coef_x0", "coef_x0_prev")}
    visited, alphas_cumprod = _interleaved(timesteps, timesteps[1:]), _interleaved(current, current[1:])
    return make_table(visited, alphas_cumprod, prediction_type, columns=rows, start=2 * start, **shared)


def _rows(level: Tensor, next_level: Tensor, alpha: Tensor, next_alpha: Tensor) -> dict[str, Tensor]:
    """The columns of Euler's steps and of their corrections, in turn, for x = alpha (x_0 + level eps)."""
    ratio = next_level / level
    correction = next_alpha[:-1] * (level - next_level)[:-1] / (2 * next_level[:-1])
    return {
        "coef_x": _interleaved(next_alpha / alpha * ratio, torch.ones_like(correction)),
        "coef_x0": _interleaved(next_alpha * (1 - ratio), correction),
        "coef_x0_prev": _interleaved(torch.zeros_like(ratio), -correction),
    }


def _interleaved(steps: Tensor, corrections: Tensor) -> Tensor:
    """Rows [2 n - 1] in the order in which they run: of the n steps and of the n - 1 corrections."""
    rows = torch.empty(2 * len(steps) - 1, dtype=steps.dtype, device="cpu")
    rows[::2], rows[1::2] = steps, corrections
    return rows
