"""Sets of images that are compared."""

import torch

from diffusion.data import ImageSet


def images(seed: int, count: int, low: int = 0) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    return ImageSet(
        torch.randint(low, 200 + low // 2, (count, 1, 4, 4), dtype=torch.uint8, generator=generator),
        None,
        None,
        f"noise {seed}",
    )
