"""NaiveUNet: the network of cloneofsimo/minDiffusion, which is unconditional."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .arguments import check_arguments, time_fraction
from .network import Network, NetworkConfig, check_halvings


@dataclass(frozen=True)
class NaiveUNetConfig(NetworkConfig):
    """The architecture of a `NaiveUNet`.

    sample_size: height and width of the images, or one integer for both; multiples of 8 * pool.
    in_channels, out_channels: channels of the images and of the output.
    channels: the base width. The coarser levels have twice as many channels.
    pool: side of the windows of the coarsest feature map that are averaged to one vector.
    num_timesteps: T. The network sees the fraction t / T.
    wide: blocks are twice as wide inside, normalisation has 32 groups, not 8, and the time is added once, as
        in the project's first version.
    """

    bounds: ClassVar = {"num_timesteps": {"least": 1, "most": 2**31 - 1}}

    sample_size: int | tuple[int, int] = 32
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    pool: int = 4
    num_timesteps: int = 1000
    wide: bool = False

    num_classes: ClassVar[None] = None
    has_null_label: ClassVar[bool] = False

    @property
    def norm_groups(self) -> int:
        """Groups of every normalisation."""
        return 32 if self.wide else 8

    def check_size(self, size: Sequence[int]) -> None:
        """ValueError unless images of this height and width can be halved three times and pooled."""
        check_halvings(size, 3, self.pool, "windows")


class Conv3(nn.Module):
    """Three convolutions, each with normalisation and ReLU; `residual` adds the first one's output."""

    def __init__(self, config: NaiveUNetConfig, in_channels: int, out_channels: int, residual: bool = False):
        super().__init__()
        inner = 2 * out_channels if config.wide else out_channels

        def conv(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
            norm = nn.GroupNorm(config.norm_groups, outputs)
            return nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU()

        self.first = nn.Sequential(*conv(in_channels, out_channels))
        self.others = nn.Sequential(*conv(out_channels, inner), *conv(inner, out_channels))
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        h = self.others(first)
        return (first + h) / 1.414 if self.residual else h


class Up(nn.Module):
    """Doubles the resolution of the features with those of the way down, by a transposed convolution.

    block: makes each of the two blocks that follow, from its channels in and out.
    """

    def __init__(self, in_channels: int, out_channels: int, block: Callable[[int, int], nn.Module]):
        super().__init__()
        self.upsample = nn.ConvTranspose2d(in_channels, out_channels, 2, 2)
        self.blocks = nn.Sequential(*(block(out_channels, out_channels) for _ in range(2)))

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.blocks(self.upsample(torch.cat([x, skip], dim=1)))


class NaiveUNet(Network):
    """The UNet of minDiffusion, by `NaiveUNetConfig`, with max pooling and a vector in the middle."""

    Config = NaiveUNetConfig
    config: NaiveUNetConfig

    def __init__(self, config: NaiveUNetConfig):
        super().__init__()
        config.check_size(config.image_shape)
        self.config = config
        width, window = config.channels, config.pool
        self.input = Conv3(config, config.in_channels, width, residual=True)
        self.down1 = Conv3(config, width, width)
        self.down2 = Conv3(config, width, 2 * width)
        self.down3 = Conv3(config, 2 * width, 2 * width)
        self.time_frequencies = nn.Linear(1, 2 * width, bias=False)
        self.time_projection = nn.Linear(2 * width, 2 * width)
        self.unpool = nn.ConvTranspose2d(2 * width, 2 * width, window, window)
        self.unpool_norm = nn.GroupNorm(config.norm_groups, 2 * width)
        block = partial(Conv3, config)
        self.up1 = Up(4 * width, 2 * width, block)
        self.up2 = Up(4 * width, width, block)
        self.up3 = Up(2 * width, width, block)
        self.output = nn.Conv2d(2 * width, config.out_channels, 3, padding=1)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """The prediction [B, out_channels, H, W] for noisy images x [B, in_channels, H, W].

        timesteps: [B], integers 0..T, or floating-point fractions of T in [0, 1]. labels: None. backend:
        unused, as all is plain PyTorch. ValueError for labels, and for another size of images.
        """
        check_arguments(self.config, x, timesteps, labels)
        dtype = self.time_projection.weight.dtype
        time = time_fraction(timesteps, self.config.num_timesteps)[:, None].to(dtype)
        time = self.time_projection(torch.sin(self.time_frequencies(time)))[:, :, None, None]

        x = self.input(x.to(dtype).contiguous())
        down1 = F.max_pool2d(self.down1(x), 2)
        down2 = F.max_pool2d(self.down2(down1), 2)
        down3 = F.max_pool2d(self.down3(down2), 2)
        h = self.unpool(F.relu(F.avg_pool2d(down3, self.config.pool)) + time)
        h = F.relu(self.unpool_norm(h))
        h = self.up1(h, down3)
        h = self.up2(h if self.config.wide else h + time, down2)
        h = self.up3(h, down1)
        return self.output(torch.cat([h, x], dim=1))
