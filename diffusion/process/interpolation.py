"""Interpolation of noise."""

from collections.abc import Sequence

import numpy as np
import torch

from ..utils.validation import number, numbers, refuse, shown


def slerp(
    a: torch.Tensor, b: torch.Tensor, share: float | Sequence[float] | np.ndarray | torch.Tensor
) -> torch.Tensor:
    """Noise between two noises, on the arc between them, like a; for K shares, [K, ...].

    sin((1 - s) theta) / sin(theta) a + sin(s theta) / sin(theta) b for images that enclose the angle theta
    (Shoemake 1985; White 2016, arXiv 1609.04468). Unlike (1 - s) a + s b, it keeps the length of noise, which
    a diffusion model expects. Images in the same or in opposite directions are interpolated linearly.

    a, b: floating-point [N, ...] of one shape; each of the N images has its own angle. share: s in 0..1, one
    number or K of them. ValueError for other shapes or shares.
    """
    for name, noise in (("a", a), ("b", b)):
        if not isinstance(noise, torch.Tensor) or not noise.is_floating_point() or noise.ndim < 2:
            refuse(name, "a floating-point tensor [N, ...]", noise)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, and they have {list(a.shape)} and {list(b.shape)}")
    single = not isinstance(share, torch.Tensor | np.ndarray | Sequence) or getattr(share, "ndim", 1) == 0
    shares = (
        torch.tensor([number("share", share)], dtype=torch.float64, device="cpu")
        if single
        else numbers("share", share)
    )
    if not ((shares >= 0) & (shares <= 1)).all():
        raise ValueError(f"share must be in 0..1, not {shown(share)}")
    first, second = a.double().flatten(1), b.double().flatten(1)
    lengths = first.norm(dim=1) * second.norm(dim=1)
    cosine = ((first * second).sum(dim=1) / lengths.clamp(min=1e-300)).clamp(-1, 1)
    theta = torch.arccos(cosine)  # [N]
    s = shares.to(first)[:, None]  # [K, 1]
    straight = torch.sin(theta) < 1e-6
    sine = torch.where(straight, 1, torch.sin(theta))
    from_a = torch.where(straight, 1 - s, torch.sin((1 - s) * theta) / sine)  # [K, N]
    from_b = torch.where(straight, s, torch.sin(s * theta) / sine)
    found = (from_a[..., None] * first + from_b[..., None] * second).reshape(-1, *a.shape).to(a.dtype)
    return found[0] if single else found
