"""Ancestral sampling: DDPM."""

from typing import Annotated

import torch

from ..process.bound import VARIANCES
from ..process.schedule import NoiseSchedule
from ..utils.validation import choice
from .table import StepTable, make_table, next_alphas_cumprod
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
    variance: Annotated[str, ", ".join(VARIANCES)] = "fixed_small",
) -> StepTable:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2 and eq. 7), strided where steps < T.

        x_next ~ N(coef_x x + coef_x0 x0, sigma^2 I), the posterior q(x_next | x, x0)

    variance: "fixed_small" is the variance of the posterior, "fixed_large" beta, both for the stride taken;
        "learned_range" interpolates between their logarithms by the model's second half of channels (Nichol &
        Dhariwal 2021, arXiv 2102.09672, eq. 15).

    The package's docstring has the other arguments. diffusers adds noise in the last step, too, where that is
    not at timestep 0 (trailing, fixed_large or learned_range); this does not.
    """
    choice("variance", variance, VARIANCES)
    timesteps = visited_timesteps(schedule, steps, spacing)
    current = schedule.alphas_cumprod[timesteps]
    following = next_alphas_cumprod(current)
    alpha = current / following
    beta = 1 - alpha
    posterior_variance = (1 - following) / (1 - current) * beta
    if variance == "learned_range":
        # The posterior variance of the last step is 0, and its logarithm is clipped; sigma is 0 there.
        noise = {
            "sigma": torch.ones_like(beta),
            "log_var_min": posterior_variance.clamp(min=1e-20).log(),
            "log_var_max": beta.log(),
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
        learned_variance=variance == "learned_range",
        coef_x=alpha.sqrt() * (1 - following) / (1 - current),
        coef_x0=following.sqrt() * beta / (1 - current),
        **noise,
    )
