"""The definition of the reverse step in float64, and the cases that run by default."""

import math

import torch

from diffusion.kernels import _triton, philox_normal
from diffusion.kernels.ops.reverse_step.cases import CASES
from helpers.thinning import exhaustive_but

# Triton's interpreter takes seconds for a case of more elements, and leaves those out.
PARAMETERS = exhaustive_but(
    CASES,
    [name for name, case in CASES.items() if not _triton.INTERPRETED or math.prod(case.shape) <= 10_000],
)


def formula(x, out, row, *, model_output_uncond, x0_prev, noise, seed, sample_ids, stream):
    """The documented equations, in the dtype of the arguments."""
    channels = x.shape[1]
    sigma = torch.tensor(row.sigma, dtype=x.dtype)
    if out.shape[1] == 2 * channels:
        fraction = (out[:, channels:] + 1) / 2
        sigma = row.sigma * torch.exp(0.5 * (fraction * row.log_var_max + (1 - fraction) * row.log_var_min))
    cond = out[:, :channels]
    if model_output_uncond is not None:
        uncond = model_output_uncond[:, :channels]
        cond = uncond + row.guidance_scale * (cond - uncond)
    x0 = (row.x0_from_x * x + row.x0_from_output * cond).clamp(-row.clip_x0, row.clip_x0)
    x_next = row.coef_x * x + row.coef_x0 * x0 + row.coef_output * cond
    if row.coef_x0_prev != 0:
        x_next = x_next + row.coef_x0_prev * x0_prev
    if row.sigma != 0:
        z = noise
        if z is None:
            z = philox_normal(
                x.shape, seed=seed, sample_ids=sample_ids, stream=stream, backend="reference"
            ).to(x.dtype)
        x_next = x_next + sigma * z
    return x_next, x0
