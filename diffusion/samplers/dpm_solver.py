"""DPM-Solver++(2M)."""

import math
from typing import Annotated

import torch

from ..process.prediction import check_x0_determined
from ..process.schedule import NoiseSchedule
from ..utils.validation import switch
from .table import StepTable, make_table, next_alphas_cumprod
from .timesteps import visited_timesteps


def dpmpp_2m(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    sde: Annotated[bool, "use the stochastic form"] = False,
) -> StepTable:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2), or its SDE form (eq. 19).

    sde: the stochastic form.

    The package's docstring has the other arguments. The first and the last step, which goes to x_0 without
    noise, are of first order. Timesteps: leading and linspace leave out 0 (see `timesteps.spaced_timesteps`),
    but for the full chain, which visits every timestep; there the grids of diffusers would repeat one.
    """
    switch("sde", sde)
    timesteps = visited_timesteps(schedule, steps, spacing, skip_zero=True)
    current = schedule.alphas_cumprod[timesteps]
    check_x0_determined(prediction_type, current)
    # The solver runs in lambda = log(alpha / sigma), so zero SNR stands for 2^-24 (as in diffusers), or for
    # less where the next timestep is nearly as noisy.
    current = torch.where(current > 0, current, (next_alphas_cumprod(current) / 2).clamp(max=2**-24))
    following = next_alphas_cumprod(current)
    log_snr_half = 0.5 * torch.log(current / (1 - current))
    h = torch.cat([log_snr_half[1:], log_snr_half.new_full((1,), math.inf)]) - log_snr_half
    gain = -torch.expm1(-2 * h if sde else -h)
    coef_x0 = following.sqrt() * gain
    # D = x0 + (x0 - x0_prev) / (2 r), r = h_prev / h; without the second term in the first and last step.
    extrapolation = torch.zeros_like(h)
    extrapolation[1:-1] = 0.5 * h[1:-1] / h[:-2]
    coef_x = ((1 - following) / (1 - current)).sqrt()
    return make_table(
        timesteps,
        current,
        prediction_type,
        clip,
        guidance_scale,
        guidance_interval,
        coef_x=coef_x * torch.exp(-h) if sde else coef_x,
        coef_x0=coef_x0 * (1 + extrapolation),
        coef_x0_prev=-coef_x0 * extrapolation,
        sigma=((1 - following) * gain).sqrt() if sde else torch.zeros_like(h),
    )
