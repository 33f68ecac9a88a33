"""The forward process, from an image to a noisier one.

Everywhere x_t = alpha x_0 + sigma eps with alpha = sqrt(alphas_cumprod[t]) and sigma = sqrt(1 -
alphas_cumprod[t]). The coefficients are computed in float64 and cast last, to float32 or to the images'
dtype where that is wider; so bfloat16 images give float32 results.
"""

import torch

from ..utils.validation import readable
from .schedule import NoiseSchedule


def at_timesteps(table: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """table[t] for t [B], cast for arithmetic with `like` [B, ...] and shaped [B, 1, ...]."""
    if t.dtype != torch.int64 or t.shape != like.shape[:1]:
        raise ValueError(
            f"t must be int64 of shape [{len(like)}], one timestep per image, not {t.dtype} {list(t.shape)}"
        )
    if t.device.type == "cpu" and len(t) and readable(t) and not 0 <= t.min() <= t.max() < len(table):
        raise ValueError(f"timesteps must be in 0..{len(table) - 1}; got {t.min()} to {t.max()}")
    table = table.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)
    return table.index_select(0, t).reshape(-1, *[1] * (like.ndim - 1))


def check_same_shape(x: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """ValueError unless `other`, called `name` in the error, has the shape of the images x."""
    if x.shape != other.shape:
        raise ValueError(f"{name} must have the images' shape {list(x.shape)}, not {list(other.shape)}")


def q_sample(schedule: NoiseSchedule, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_t ~ q(x_t | x_0) = alpha x_0 + sigma noise (Ho et al. 2020, arXiv 2006.11239, eq. 4).

    x0: images [B, ...] in [-1, 1]; t: int64 [B] in 0..T-1; noise: standard normal, like x0. Returns x_t like
    x0. ValueError for other shapes or timesteps (the range is checked where t is on the CPU).
    """
    check_same_shape(x0, noise, "noise")
    alpha = at_timesteps(schedule.alphas_cumprod.sqrt(), t, x0)
    sigma = at_timesteps((1 - schedule.alphas_cumprod).sqrt(), t, x0)
    return alpha * x0 + sigma * noise
