"""ConvStack: the network of minDiffusion's superminddpm.py, convolutions that see no time and no label."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..utils.validation import refuse
from .arguments import check_arguments
from .network import Network, NetworkConfig


@dataclass(frozen=True)
class ConvStackConfig(NetworkConfig):
    """The architecture of a `ConvStack`.

    sample_size: height and width of the images, or one integer for both.
    in_channels: channels of the images and of the output.
    widths: channels after each of the 7x7 convolutions before the last one, which is 3x3.
    """

    sample_size: int | tuple[int, int] = 28
    in_channels: int = 1
    widths: tuple[int, ...] = (64, 128, 256, 512, 256, 128, 64)

    num_classes: ClassVar[None] = None
    has_null_label: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths:
            refuse("widths", "a number for at least one convolution", list(self.widths))

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels


class ConvStack(Network):
    """7x7 convolutions with batch normalisation and leaky ReLU, and a last 3x3 one, by `ConvStackConfig`."""

    Config = ConvStackConfig
    config: ConvStackConfig

    def __init__(self, config: ConvStackConfig):
        super().__init__()
        self.config = config
        inputs = (config.in_channels, *config.widths)
        layers = [
            nn.Sequential(nn.Conv2d(before, width, 7, padding=3), nn.BatchNorm2d(width), nn.LeakyReLU())
            for before, width in zip(inputs, config.widths, strict=False)
        ]
        output = nn.Conv2d(config.widths[-1], config.in_channels, 3, padding=1)
        self.layers = nn.Sequential(*layers, output)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """The prediction [B, in_channels, H, W] for noisy images of that shape, at any timestep [B].

        labels: None. backend: unused, as all is plain PyTorch. ValueError for labels.
        """
        check_arguments(self.config, x, timesteps, labels)
        return self.layers(x.to(next(self.parameters()).dtype).contiguous())
