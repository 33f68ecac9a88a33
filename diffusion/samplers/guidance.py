"""Classifier-free guidance: its scale at every step, and its rescaling."""

import torch

from ..utils.validation import interval, number


def guidance_scales(
    timesteps: torch.Tensor, guidance_scale: float, guidance_interval: tuple[float, float] | None = None
) -> torch.Tensor:
    """Guidance scale of every step, float64 [n], for timesteps [n].

    The scale g of out = uncond + g (cond - uncond): 1 is the conditional prediction, 0 the unconditional; the
    weight w of Ho & Salimans 2022, arXiv 2207.12598, eq. 6, is g - 1. guidance_interval = (low, high) limits
    guidance to low <= timestep <= high; elsewhere the scale is 1, and the unconditional half need not be
    evaluated. Kynkaanniemi et al. 2024, arXiv 2404.07724, give the interval in noise levels, which are
    sqrt((1 - alphas_cumprod) / alphas_cumprod) at a timestep. ValueError for a scale that is not finite or an
    interval that is not two numbers in order.
    """
    scale = number("guidance_scale", guidance_scale)
    scales = torch.full_like(timesteps, scale, dtype=torch.float64)
    if guidance_interval is None:
        return scales
    low, high = interval("guidance_interval", guidance_interval)
    inside = (timesteps >= low) & (timesteps <= high)
    return torch.where(inside, scales, 1.0)


def project_guidance(update: torch.Tensor, cond: torch.Tensor, parallel: float) -> torch.Tensor:
    """The guidance's update with another share of the part that is parallel to the conditional prediction.

    Sadat et al. 2024, arXiv 2410.02416, section 4: that part mostly raises the contrast. update: the
    difference [B, ...] of the conditional and the unconditional prediction. cond: the former, like update.
    parallel: the share of the parallel part that is kept; 1 changes nothing. The sums are in float64.
    """
    dims = tuple(range(1, update.ndim))
    direction = cond.double()
    direction = direction / direction.square().sum(dim=dims, keepdim=True).sqrt().clamp(min=1e-12)
    along = (update.double() * direction).sum(dim=dims, keepdim=True) * direction
    return update + ((parallel - 1) * along).to(update.dtype)


def rescale_guidance(guided: torch.Tensor, cond: torch.Tensor, phi: float) -> torch.Tensor:
    """The guided prediction, rescaled towards the standard deviation of the conditional one, like `guided`.

    Lin et al. 2023, arXiv 2305.08891, eq. 15 and 16. guided, cond: predictions [B, ...] without variance
    channels. phi: in [0, 1]; 0 changes nothing, and 1 gives each image the standard deviation of its
    conditional prediction; the paper uses 0.7. ValueError for other phi or shapes.
    """
    phi = number("phi", phi, 0, 1)
    if guided.shape != cond.shape:
        raise ValueError(f"guided {list(guided.shape)} and cond {list(cond.shape)} must have one shape")
    dims = tuple(range(1, guided.ndim))
    std_guided, std_cond = (x.std(dim=dims, correction=0, keepdim=True) for x in (guided, cond))
    # A constant image has no contrast to restore.
    ratio = torch.where(std_guided > 0, std_cond / std_guided, 1)
    return guided * (phi * ratio + (1 - phi))
