"""The definition of the reverse step in float64."""

import torch

from diffusion.kernels import philox_normal


def formula(x, out, row, *, model_output_uncond, x0_prev, noise, seed, sample_ids, stream):
    """The documented equations, in the dtype of the arguments."""
    _timestep, g, p_x, p_o, clip, a, b, d, e, s, log_min, log_max = row
    channels = x.shape[1]
    sigma = torch.tensor(s, dtype=x.dtype)
    if out.shape[1] == 2 * channels:
        fraction = (out[:, channels:] + 1) / 2
        sigma = s * torch.exp(0.5 * (fraction * log_max + (1 - fraction) * log_min))
    cond = out[:, :channels]
    if model_output_uncond is not None:
        uncond = model_output_uncond[:, :channels]
        cond = uncond + g * (cond - uncond)
    x0 = (p_x * x + p_o * cond).clamp(-clip, clip)
    x_next = a * x + b * x0 + e * cond
    if d != 0:
        x_next = x_next + d * x0_prev
    if s != 0:
        z = noise
        if z is None:
            z = philox_normal(
                x.shape, seed=seed, sample_ids=sample_ids, stream=stream, backend="reference"
            ).to(x.dtype)
        x_next = x_next + sigma * z
    return x_next, x0


def cast(dtype, args, kwargs):
    def to(t):
        return t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return tuple(map(to, args)), {name: to(t) for name, t in kwargs.items()}
