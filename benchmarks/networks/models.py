"""The six networks of the comparison: their real configurations, and tiny ones of the same kinds.

They have random weights. Networks of diffusers and denoising-diffusion-pytorch are those packages' own;
guided-diffusion's and EDM's, which are no packages, are this package's modules for their checkpoints, in
plain PyTorch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import diffusion
from diffusion.models.edm import EDMConfig, EDMUNet

from ..sampling.models import CIFAR10_UNLABELLED, DDPM

TEXT = (77, 768)  # positions and width of CLIP's embedding of a text
TINY_TEXT = (7, 24)


class Wrapped(nn.Module):
    """A module whose `evaluate(module, x, t, *more)` is one tensor, for exports and for equal calls."""

    def __init__(self, module: nn.Module, evaluate: Callable[..., Tensor]):
        super().__init__()
        self.module, self.evaluate = module, evaluate

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.evaluate(self.module, *inputs)


class PlainPyTorch(nn.Module):
    """This package's network without its kernels, as the project it is from has it."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(x, timesteps, labels, backend="reference")


@dataclass(frozen=True)
class Model:
    """A network of the comparison.

    build(small, size): the module, with images of size x size pixels; None for the configuration's own.
    evaluate(module, x, t, *more): its output, one tensor. sizes: of the images, and of the tiny ones.
    batches: that are compared. more(small, batch): the inputs after x and t. denoises: x and t are a noisy
    image and its noise level, and the output is the image; else t is a timestep of 1000 and the output
    begins with the noise. module_in_bf16: how it computes in bfloat16, "weights" or "autocast". exact, fast:
    the aims, as ratios to the fastest engine in float32 and to OpenVINO in bfloat16.
    """

    origin: str
    build: Callable[[bool, int | None], nn.Module]
    evaluate: Callable[..., Tensor]
    sizes: tuple[int, int]
    batches: tuple[int, ...]
    exact: float
    fast: float
    channels: int = 3
    more: Callable[[bool, int], tuple[Tensor, ...]] = lambda small, batch: ()
    denoises: bool = False
    module_in_bf16: str = "weights"

    def size(self, small: bool) -> int:
        return self.sizes[small]

    def network(self, small: bool, size: int | None = None) -> nn.Module:
        """The module in eval mode with random weights, none of them as initialised to a constant."""
        torch.manual_seed(0)
        return randomised(self.build(small, size)).eval().requires_grad_(False)

    def inputs(self, small: bool, batch: int, size: int | None = None) -> tuple[Tensor, ...]:
        """x [B, C, H, W], t [B] and more, which do not depend on the weights."""
        torch.manual_seed(1)
        size = size or self.size(small)
        x = torch.randn(batch, self.channels, size, size)
        t = torch.full((batch,), 5.0) if self.denoises else torch.full((batch,), 500)
        return (x, t, *self.more(small, batch))


def randomised(module: nn.Module) -> nn.Module:
    """Adds noise to weights that are all equal: an output must depend on every part of the network."""
    with torch.no_grad():
        for parameter in module.parameters():
            first = parameter.flatten()[0].item()
            if bool((parameter == first).all()):
                scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 and first == 0 else 0.1
                parameter.normal_(first, scale)
    return module


def _ddpm(**config: Any) -> Callable[[bool, int | None], nn.Module]:
    def build(small: bool, size: int | None) -> nn.Module:
        from diffusers import UNet2DModel

        tiny = {"block_out_channels": (32,) * len(config["block_out_channels"]), "layers_per_block": 1}
        sizes = {} if size is None else {"sample_size": size}
        return UNet2DModel(**config | (tiny if small else {}) | sizes)

    return build


def _guided_diffusion(small: bool, size: int | None) -> nn.Module:
    config = diffusion.UNetConfig(
        sample_size=size or (16 if small else 64),
        out_channels=6,
        channels=32 if small else 192,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=1 if small else 3,
        attention_levels=(1, 2, 3),
        head_channels=32 if small else 64,
        scale_shift=True,
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample="resblock",
        upsample="resblock",
        downsample_padding="symmetric",
        norm_eps=1e-5,
        num_classes=10 if small else 1000,
        has_null_label=False,
    )
    return PlainPyTorch(diffusion.UNet(config))


def _edm(small: bool, size: int | None) -> nn.Module:
    config = EDMConfig(
        sample_size=size or (16 if small else 32),
        channels=32 if small else 128,
        channel_mult=(1, 1, 1) if small else (2, 2, 2),
        num_res_blocks=1 if small else 4,
    )
    return PlainPyTorch(EDMUNet(config))


def _lucidrains(small: bool, size: int | None) -> nn.Module:
    from denoising_diffusion_pytorch import Unet

    return Unet(16 if small else 64, dim_mults=(1, 2, 4, 8))


def _stable_diffusion(small: bool, size: int | None) -> nn.Module:
    from diffusers import UNet2DConditionModel

    tiny = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1, "attention_head_dim": 4}
    return UNet2DConditionModel(
        sample_size=size or (8 if small else 64),
        cross_attention_dim=(TINY_TEXT if small else TEXT)[1],
        **(tiny if small else {"attention_head_dim": 8}),
    )


def _first(module: nn.Module, *inputs: Tensor) -> Tensor:
    return module(*inputs, return_dict=False)[0]


def _only(module: nn.Module, *inputs: Tensor) -> Tensor:
    return module(*inputs)


def _labels(small: bool, batch: int) -> tuple[Tensor, ...]:
    return (torch.arange(batch) % 10,)


def _text(small: bool, batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, *(TINY_TEXT if small else TEXT)),)


MODELS: dict[str, Model] = {
    "ddpm-cifar10": Model(
        "diffusers UNet2DModel, google/ddpm-cifar10-32",
        _ddpm(**CIFAR10_UNLABELLED),
        _first,
        (32, 16),
        (1, 8),
        exact=2.0,
        fast=1.6,
    ),
    "ddpm-celebahq": Model(
        "diffusers UNet2DModel, google/ddpm-celebahq-256",
        _ddpm(
            **DDPM,
            sample_size=256,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=(*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4),
        ),
        _first,
        (256, 32),
        (1,),
        exact=2.0,
        fast=1.6,
    ),
    "guided-diffusion": Model(
        "guided-diffusion, 64x64 class-conditional (this package's module)",
        _guided_diffusion,
        _only,
        (64, 16),
        (1,),
        exact=1.8,
        fast=1.5,
        more=_labels,
    ),
    "edm-cifar10": Model(
        "EDM SongUNet (DDPM++), CIFAR-10 (this package's module)",
        _edm,
        _only,
        (32, 16),
        (8,),
        exact=1.8,
        fast=1.5,
        denoises=True,
    ),
    "lucidrains": Model(
        "denoising-diffusion-pytorch Unet(64, (1, 2, 4, 8)), 128x128",
        _lucidrains,
        _only,
        (128, 16),
        (1,),
        exact=1.5,
        fast=1.3,
        module_in_bf16="autocast",
    ),
    "stable-diffusion": Model(
        "diffusers UNet2DConditionModel, Stable Diffusion 1.5, 64x64 latents",
        _stable_diffusion,
        _first,
        (64, 8),
        (2,),
        exact=1.3,
        fast=1.3,
        channels=4,
        more=_text,
    ),
}
