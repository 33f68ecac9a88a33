"""The samplers: each is a function that writes a reverse process down as one row of numbers a step.

A row, `kernels.StepCoefficients`, holds the numbers of

    out    = uncond + guidance_scale * (cond - uncond)
    x0     = clamp(x0_from_x * x + x0_from_output * out, -clip_x0, clip_x0)
    x_next = coef_x * x + coef_x0 * x0 + coef_x0_prev * x0_prev + coef_output * out + sigma * z

with z ~ N(0, I), and everything here is float64. All samplers take the same first arguments:

schedule: the model's NoiseSchedule. steps: number of steps, 1..T; None is the full chain. prediction_type:
"epsilon", "sample" (x_0) or "v_prediction". spacing: see `timesteps.spaced_timesteps`. clip: x_0 is clipped
to [-clip, clip]; None or inf leaves it. guidance_scale, guidance_interval: see `guidance.guidance_scales`.

They raise ValueError for values outside these, and for epsilon prediction where the first timestep visited
has zero SNR, since x_0 is undetermined there. Each step leads to the timestep of the next row, and the last
to x_0, without noise. A `SpacingWarning` tells, once a process, of a start too far below T - 1.
"""

from collections.abc import Callable

from .ancestral import ddpm
from .ddim import ddim
from .dpm_solver import dpmpp_2m
from .table import StepTable
from .timesteps import SpacingWarning

__all__ = ["SAMPLERS", "SpacingWarning", "StepTable", "ddim", "ddpm", "dpmpp_2m"]

SAMPLERS: dict[str, Callable[..., StepTable]] = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpmpp_2m}
