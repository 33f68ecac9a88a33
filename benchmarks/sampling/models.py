"""The networks that are timed: one set of weights, as this package's model and as diffusers'."""

import json
from dataclasses import replace
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn

import diffusion
from diffusion.importers.diffusers_unet import convert_weights, unet_config

from ..flops import flops_of_unet

CLASSES = 10

DDPM: dict[str, Any] = {  # of google/ddpm-*
    "layers_per_block": 2,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}
CIFAR10_UNLABELLED: dict[str, Any] = DDPM | {  # google/ddpm-cifar10-32's
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
# The last of the labels' embeddings stands for no label.
CIFAR10 = CIFAR10_UNLABELLED | {"num_class_embeds": CLASSES + 1}


class Pair(NamedTuple):
    """name: of the model. ours, theirs: the same network. flops: of one evaluation of an image."""

    name: str
    ours: diffusion.DDPM
    theirs: nn.Module
    flops: int

    @property
    def shape(self) -> tuple[int, int, int]:
        config = self.ours.unet.config
        return (config.in_channels, *config.image_shape)


class _Plain(nn.Module):
    """This package's UNet in plain PyTorch, called as diffusers' are."""

    def __init__(self, unet: diffusion.UNet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, class_labels, return_dict=False):
        return (self.unet.denoise(x, self.unet.embed(t, class_labels), "reference"),)


def make(name: str, size: int | None = None, **changes: Any) -> Pair:
    """ "cifar10": DDPM's network with random weights, none of them zero; "mnist": the bundled digits.

    size: of cifar10's images, by default 32. changes: of cifar10's configuration, as diffusers names it.
    diffusers has no network like the bundled one, so there the peers run this package's module in plain
    PyTorch, with the bundled weights.
    """
    if name == "mnist":
        model = diffusion.load("mnist").requires_grad_(False)
        return Pair(name, model, _Plain(model.unet).eval(), flops_of_unet(model.unet))
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(**CIFAR10 | ({} if size is None else {"sample_size": size}) | changes)
    theirs = theirs.eval().requires_grad_(False)
    for key, parameter in theirs.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.1)
    config = replace(
        unet_config(json.loads(theirs.to_json_string())), has_null_label=True, num_classes=CLASSES
    )
    unet = diffusion.UNet(config).requires_grad_(False)
    unet.load_state_dict(convert_weights(config, theirs.state_dict()))
    model = diffusion.DDPM(unet, diffusion.NoiseSchedule.linear(1000)).eval()
    return Pair(name, model, theirs, flops_of_unet(unet))
