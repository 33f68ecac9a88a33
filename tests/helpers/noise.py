"""Noise that tests give to samplers."""

import torch


def fixed_noise(count: int, shape=(2, 8, 8)):
    """k -> standard normals that depend on k alone."""
    return lambda k: torch.randn(count, *shape, generator=torch.Generator().manual_seed(1000 + k))
