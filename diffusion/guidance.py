"""Classifier-free guidance: its scale at every step, its rescaling, and the labels that training drops."""

import math

import torch


def guidance_scales(
    timesteps: torch.Tensor, guidance_scale: float, interval: tuple[float, float] | None = None
) -> torch.Tensor:
    """Guidance scale of every step, float64 [n], for timesteps [n].

    The scale g of out = uncond + g (cond - uncond): 1 is the conditional prediction, 0 the unconditional; the
    weight w of Ho & Salimans 2022, arXiv 2207.12598, eq. 6, is g - 1. interval = (low, high) limits guidance
    to low <= timestep <= high; elsewhere the scale is 1, and the unconditional half need not be evaluated.
    Kynkaanniemi et al. 2024, arXiv 2404.07724, give the interval in noise levels, which are
    sqrt((1 - alphas_cumprod) / alphas_cumprod) at a timestep. ValueError for a scale that is not finite or an
    interval that is not two numbers in order.
    """
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be a finite number, not {guidance_scale}")
    scales = torch.full(timesteps.shape, float(guidance_scale), dtype=torch.float64)
    if interval is None:
        return scales
    if len(interval) != 2 or not interval[0] <= interval[1]:
        raise ValueError(
            f"guidance_interval must be two timesteps (low, high) with low <= high, not {interval}"
        )
    inside = (timesteps >= interval[0]) & (timesteps <= interval[1])
    return torch.where(inside, scales, 1.0)


def check_rescale(phi: float) -> None:
    """ValueError unless phi is in [0, 1]."""
    if not 0 <= phi <= 1:
        raise ValueError(f"guidance_rescale must be in [0, 1], not {phi}")


def rescale_guidance(guided: torch.Tensor, cond: torch.Tensor, phi: float) -> torch.Tensor:
    """Guided prediction with its standard deviation brought back, in part, to the conditional one's.

    guided, cond: predictions [B, ...] (without variance channels); phi in [0, 1]: 0 changes nothing, 1 gives
    every image of the batch the standard deviation of its conditional prediction (Lin et al. 2023, arXiv
    2305.08891, eq. 15 and 16, whose experiments use 0.7). ValueError for other phi or shapes.
    """
    check_rescale(phi)
    if guided.shape != cond.shape:
        raise ValueError(f"guided {list(guided.shape)} and cond {list(cond.shape)} must have one shape")
    dims = tuple(range(1, guided.ndim))
    std_guided, std_cond = (x.std(dim=dims, correction=0, keepdim=True) for x in (guided, cond))
    ratio = torch.where(
        std_guided > 0, std_cond / std_guided, 1
    )  # a constant image has no contrast to restore
    return guided * (phi * ratio + (1 - phi))


def drop_labels(
    labels: torch.Tensor, p: float, null_label: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """labels, int64 [B], each replaced by null_label with probability p (Ho & Salimans 2022, algorithm 1).

    generator: source of the randomness; torch's own for the labels' device if None. ValueError for p outside
    [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"the probability of dropping a label must be in [0, 1], not {p}")
    device = labels.device if generator is None else generator.device
    dropped = torch.rand(labels.shape, generator=generator, device=device) < p
    return labels.masked_fill(dropped.to(labels.device), null_label)
