"""DDIM."""

from typing import Annotated

from ..process.prediction import epsilon_coefficients
from ..process.schedule import NoiseSchedule
from ..utils.validation import number, switch
from .table import StepTable, make_table, next_alphas_cumprod
from .timesteps import visited_timesteps


def ddim(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    eta: Annotated[float, "noise, from 0 (deterministic) to 1 (as much as ddpm)"] = 0.0,
    use_clipped_model_output: Annotated[bool, "compute the predicted noise from the clipped image"] = False,
) -> StepTable:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).

        x_next = alpha' x0 + sqrt(1 - alpha'^2 - sigma^2) eps + sigma z,   alpha'^2 = alphas_cumprod of x_next

    eta: 0 is deterministic, 1 is ancestral sampling.
    use_clipped_model_output: whether eps follows from the clipped x_0, as in guided-diffusion, or is the
        model's own, as in diffusers unless told otherwise. Under guidance the difference is large: where x_0
        is clipped and eps is not, the two no longer make up x, and images fall apart.

    The package's docstring has the other arguments. Every step leads to the next timestep visited, the
    paper's tau_{i-1}. diffusers' DDIMScheduler leads from t to t - T // steps instead. That is the same
    timestep with leading, and with trailing where steps divides T. Elsewhere it is another one, and images of
    diffusers keep noise. ValueError for an eta that is negative or so large that some step would add more
    noise than its timestep has.
    """
    eta = number("eta", eta, 0)
    switch("use_clipped_model_output", use_clipped_model_output)
    timesteps = visited_timesteps(schedule, steps, spacing)
    current = schedule.alphas_cumprod[timesteps]
    following = next_alphas_cumprod(current)
    sigma = eta * ((1 - following) / (1 - current) * (1 - current / following)).sqrt()
    remaining = 1 - following - sigma**2
    if (remaining < -1e-12).any():
        raise ValueError(f"eta {eta} is too large: a step would add more noise than its timestep has; try 1")
    direction = remaining.clamp(min=0).sqrt()
    if use_clipped_model_output:  # eps = (x - alpha x_0) / sqrt(1 - alpha^2)
        coef_x = direction / (1 - current).sqrt()
        columns = {"coef_x": coef_x, "coef_x0": following.sqrt() - coef_x * current.sqrt()}
    else:
        eps_from_x, eps_from_output = epsilon_coefficients(prediction_type, current)
        columns = {
            "coef_x": direction * eps_from_x,
            "coef_x0": following.sqrt(),
            "coef_output": direction * eps_from_output,
        }
    return make_table(
        timesteps,
        current,
        prediction_type,
        clip,
        guidance_scale,
        guidance_interval,
        learned_variance=False,
        sigma=sigma,
        **columns,
    )
