"""DDIM."""

from typing import Annotated

import torch

from ..process.prediction import epsilon_coefficients
from ..process.schedule import NoiseSchedule
from ..utils.validation import number, switch
from .options import EPSILON_AT_ZERO_SNR, NOISE_IN_LAST_STEP, SET_ALPHA_TO_ONE, STEPS_OFFSET
from .table import StepTable, first_step, make_table, next_alphas_cumprod, tiny_signal
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
    strength: float = 1.0,
    eta: Annotated[float, "noise, from 0 (deterministic) to 1 (as much as ddpm)"] = 0.0,
    use_clipped_model_output: Annotated[bool, "compute the predicted noise from the clipped image"] = False,
    steps_offset: Annotated[int, STEPS_OFFSET] = 0,
    set_alpha_to_one: Annotated[bool, SET_ALPHA_TO_ONE] = True,
    noise_in_last_step: Annotated[bool, NOISE_IN_LAST_STEP] = False,
    epsilon_at_zero_snr: Annotated[bool, EPSILON_AT_ZERO_SNR] = False,
    fixed_stride: Annotated[
        bool, "lead each step T // steps timesteps down, as diffusers does, not to the next one visited"
    ] = False,
) -> StepTable:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).

        x_next = alpha' x0 + sqrt(1 - alpha'^2 - sigma^2) eps + sigma z,   alpha'^2 = alphas_cumprod of x_next

    eta: 0 is deterministic, 1 is ancestral sampling.
    use_clipped_model_output: whether eps follows from the clipped x_0, as in guided-diffusion, or is the
        model's own, as in diffusers unless told otherwise. Under guidance the difference is large: where x_0
        is clipped and eps is not, the two no longer make up x, and images fall apart.
    steps_offset: added to every timestep of leading spacing.
    set_alpha_to_one: whether the last step leads to an image without noise. If not, it leads to
        alphas_cumprod[0].
    noise_in_last_step: whether the last step adds the noise of eta, too, unless it starts at timestep 0.
    fixed_stride: whether a step leads from t to t - T // steps, or to the end below 0, as in diffusers'
        DDIMScheduler. Otherwise it leads to the next timestep visited, the paper's tau_{i-1}. That is the
        same timestep with leading, and with trailing where steps divides T. Elsewhere it is another one, and
        images of diffusers keep noise.
    epsilon_at_zero_snr: whether epsilon prediction may start at zero SNR; see `table.tiny_signal`.

    The package's docstring has the other arguments. ValueError for an eta that is negative or so large that
    some step would add more noise than its timestep has.
    """
    eta = number("eta", eta, 0)
    switch("use_clipped_model_output", use_clipped_model_output)
    switch("set_alpha_to_one", set_alpha_to_one)
    switch("noise_in_last_step", noise_in_last_step)
    timesteps = visited_timesteps(schedule, steps, spacing, strength, steps_offset=steps_offset)
    signal = schedule.alphas_cumprod.to(schedule.dtype)
    current = tiny_signal(signal[timesteps], epsilon_at_zero_snr)
    final = 1.0 if set_alpha_to_one else signal[0].item()
    if switch("fixed_stride", fixed_stride):
        below = timesteps - schedule.T // (schedule.T if steps is None else steps)
        following = torch.where(below >= 0, signal[below.clamp(min=0)], final)
    else:
        following = next_alphas_cumprod(current, final)
    sigma = eta * ((1 - following) / (1 - current) * (1 - current / following)).sqrt()
    if not noise_in_last_step:
        sigma[-1] = 0
    remaining = 1 - following - sigma**2
    if (remaining < (-1e-12 if signal.dtype == torch.float64 else -1e-6)).any():
        raise ValueError(f"eta {eta} is too large: a step would add more noise than its timestep has; try 1")
    direction = remaining.clamp(min=0).sqrt()
    if use_clipped_model_output:  # eps = (x - alpha x_0) / sqrt(1 - alpha^2)
        coef_x = direction / (1 - current).sqrt()
        columns = {"coef_x": coef_x, "coef_x0": following.sqrt() - coef_x * current.sqrt(), "sigma": sigma}
    else:
        eps_from_x, eps_from_output = epsilon_coefficients(prediction_type, current)
        columns = {
            "coef_x": direction * eps_from_x,
            "coef_x0": following.sqrt(),
            "coef_output": direction * eps_from_output,
            "sigma": sigma,
        }
    return make_table(
        timesteps,
        current,
        prediction_type,
        clip,
        guidance_scale,
        guidance_interval,
        columns,
        noise_in_last_step=noise_in_last_step,
        start=first_step(len(timesteps), strength),
    )
