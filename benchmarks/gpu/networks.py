"""The networks that are timed: DDPM's for CIFAR-10 with random weights, or in a dry run a tiny one."""

from typing import Any

import torch

import diffusion
from diffusion.training.recipe import load_recipe

CLASSES = 10
TINY = {"sample_size": 8, "channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "norm_groups": 32}
TINY_OF_DIFFUSERS = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}


def ours(dry_run: bool) -> diffusion.DDPM:
    """On the CPU, in float32, without zero weights, because zeros multiply faster than other numbers."""
    values: dict[str, Any] = {**load_recipe("cifar10-ddpm").unet, "dropout": 0.0}
    unet = diffusion.UNet(diffusion.UNetConfig(**values | (TINY if dry_run else {})))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.normal_(middle, 0.1, generator=generator)
    return diffusion.DDPM(unet, diffusion.NoiseSchedule.linear(1000)).eval().requires_grad_(False)


def pair(dry_run: bool) -> Any:
    """The same network as this package's and as diffusers', with the same weights."""
    from benchmarks.sampling.models import make

    return make("cifar10", 8, **TINY_OF_DIFFUSERS) if dry_run else make("cifar10")


def labels(count: int) -> list[int]:
    return [i % CLASSES for i in range(count)]
