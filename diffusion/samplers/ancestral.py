"""Ancestral sampling: DDPM."""

from typing import Annotated

import torch

from ..process.bound import VARIANCES
from ..process.schedule import NoiseSchedule
from ..utils.validation import choice, switch
from .options import EPSILON_AT_ZERO_SNR, NOISE_IN_LAST_STEP, SET_ALPHA_TO_ONE, STEPS_OFFSET
from .table import StepTable, first_step, make_table, next_alphas_cumprod, tiny_signal
from .timesteps import visited_timesteps


def ddpm(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    strength: float = 1.0,
    variance: Annotated[str, ", ".join(VARIANCES)] = "fixed_small",
    steps_offset: Annotated[int, STEPS_OFFSET] = 0,
    set_alpha_to_one: Annotated[bool, SET_ALPHA_TO_ONE] = True,
    noise_in_last_step: Annotated[bool, NOISE_IN_LAST_STEP] = False,
    epsilon_at_zero_snr: Annotated[bool, EPSILON_AT_ZERO_SNR] = False,
) -> StepTable:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2 and eq. 7), strided where steps < T.

        x_next ~ N(coef_x x + coef_x0 x0, sigma^2 I), the posterior q(x_next | x, x0)

    variance: "fixed_small" is the variance of the posterior, "fixed_large" beta, both for the stride taken;
        "learned_range" interpolates between their logarithms by the model's second half of channels (Nichol &
        Dhariwal 2021, arXiv 2102.09672, eq. 15).
    steps_offset: added to every timestep of leading spacing.
    set_alpha_to_one: whether the last step leads to an image without noise. If not, it leads to
        alphas_cumprod[0].
    noise_in_last_step: whether the last step adds noise, too, unless it starts at timestep 0, as diffusers
        does. It matters for fixed_large and learned_range.
    epsilon_at_zero_snr: whether epsilon prediction may start at zero SNR; see `table.tiny_signal`.

    The package's docstring has the other arguments.
    """
    choice("variance", variance, VARIANCES)
    switch("set_alpha_to_one", set_alpha_to_one)
    switch("noise_in_last_step", noise_in_last_step)
    timesteps = visited_timesteps(schedule, steps, spacing, strength, steps_offset=steps_offset)
    signal = schedule.alphas_cumprod.to(schedule.dtype)
    current = tiny_signal(signal[timesteps], epsilon_at_zero_snr)
    following = next_alphas_cumprod(current, 1.0 if set_alpha_to_one else signal[0].item())
    alpha = current / following
    beta = 1 - alpha
    posterior_variance = (1 - following) / (1 - current) * beta
    if variance == "learned_range":
        # The variances of the last step may be 0, so their logarithms are clipped, as in diffusers.
        noise = {
            "sigma": torch.ones_like(beta),
            "log_var_min": posterior_variance.clamp(min=1e-20).log(),
            "log_var_max": beta.clamp(min=1e-20).log(),
        }
    else:
        noise = {"sigma": (posterior_variance if variance == "fixed_small" else beta).sqrt()}
    return make_table(
        timesteps,
        current,
        prediction_type,
        clip,
        guidance_scale,
        guidance_interval,
        {
            "coef_x": alpha.sqrt() * (1 - following) / (1 - current),
            "coef_x0": following.sqrt() * beta / (1 - current),
            **noise,
        },
        learned_variance=variance == "learned_range",
        noise_in_last_step=noise_in_last_step,
        start=first_step(len(timesteps), strength),
    )
