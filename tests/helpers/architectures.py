"""Small models of every architecture, with inputs for their networks."""

from functools import partial

import torch

import diffusion
from diffusion import DDPM, NoiseSchedule
from diffusion.models.context_unet import ContextUNetConfig
from diffusion.models.conv_stack import ConvStackConfig
from diffusion.models.diagonal_unet import DiagonalUNetConfig
from diffusion.models.lucidrains_config import LucidrainsConfig
from diffusion.models.naive_unet import NaiveUNetConfig
from diffusion.models.registry import build
from diffusion.models.structure import config_of
from helpers.unets import VARIANTS, randomized


def bundled() -> DDPM:
    return diffusion.load("mnist")


def unet(variant: str) -> DDPM:
    return DDPM(randomized(VARIANTS[variant]), NoiseSchedule.linear())


# The smallest networks of other classes; those that take a label have it in the graph.
OTHERS = {
    "diagonal_unet": DiagonalUNetConfig(
        sample_size=8, channels=8, channel_mult=(1, 2), num_timesteps=1000, num_classes=3
    ),
    "context_unet": ContextUNetConfig(sample_size=8, channels=8, pool=2, num_classes=3),
    "naive_unet": NaiveUNetConfig(sample_size=16, channels=8, pool=2),
    "conv_stack": ConvStackConfig(sample_size=6, widths=(8, 4)),
    "lucidrains": LucidrainsConfig(
        sample_size=8,
        channels=4,
        channel_mult=(1, 2),
        full_attention=(False, True),
        num_heads=(1, 2, 2),
        head_channels=(4, 6, 4),
        num_classes=3,
    ),
}


def other(name: str) -> DDPM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build(OTHERS[name]).eval()
        for parameter in network.parameters():
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    return DDPM(network, NoiseSchedule.linear())


# "patches" is as the small CIFAR-10 recipe: patches of 2x2, in which the UNet has its levels.
MODELS = {"bundled": bundled} | {name: partial(unet, name) for name in ("conditional", "patches")}
MODELS |= {name: partial(other, name) for name in OTHERS}


def batch_of(model: DDPM, size: int) -> list[torch.Tensor]:
    config = config_of(model.unet)
    generator = torch.Generator().manual_seed(size)
    inputs = [
        torch.randn(size, config.in_channels, *config.image_shape, generator=generator),
        torch.randint(0, model.schedule.T, (size,), generator=generator),
    ]
    if config.num_classes is not None:
        inputs.append(
            torch.randint(0, config.num_classes + config.has_null_label, (size,), generator=generator)
        )
    return inputs


def expected_of(model: DDPM, inputs: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.unet(*inputs)
