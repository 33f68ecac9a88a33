"""ContextUNet: the network of TeaPearce/Conditional_Diffusion_MNIST."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .arguments import check_arguments, time_fraction
from .naive_unet import Up
from .network import Network, NetworkConfig, check_halvings


@dataclass(frozen=True)
class ContextUNetConfig(NetworkConfig):
    """The architecture of a `ContextUNet`.

    sample_size: height and width of the images, or one integer for both; multiples of 4 * pool.
    in_channels: channels of the images and of the output.
    channels: the base width. The coarser level has twice as many channels.
    pool: side of the windows of the coarsest feature map that are averaged to one vector.
    num_timesteps: T. The network sees the fraction t / T.
    num_classes: number K of classes. The label K stands for no label.
    concatenate: the embeddings of time and label are also joined to that vector, as in the first version.
    """

    bounds: ClassVar = {
        "num_timesteps": {"least": 1, "most": 2**31 - 1},
        "num_classes": {"least": 1, "most": 2**31 - 1},
    }

    sample_size: int | tuple[int, int] = 28
    in_channels: int = 1
    channels: int = 128
    pool: int = 7
    num_timesteps: int = 400
    num_classes: int = 10
    concatenate: bool = False

    has_null_label: ClassVar[bool] = True

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.in_channels

    def check_size(self, size: Sequence[int]) -> None:
        """ValueError unless images of this height and width can be halved twice and pooled."""
        check_halvings(size, 2, self.pool, "windows")


class ConvPair(nn.Module):
    """Two convolutions, each with batch normalisation and GELU.

    residual: adds the input, or the first convolution's output where the input has other channels.
    """

    def __init__(self, in_channels: int, out_channels: int, residual: bool = False):
        super().__init__()
        self.conv1 = _conv(in_channels, out_channels)
        self.conv2 = _conv(out_channels, out_channels)
        self.residual, self.same_channels = residual, in_channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.conv1(x)
        h = self.conv2(first)
        return ((x if self.same_channels else first) + h) / 1.414 if self.residual else h


def _conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.GELU())


def _embedding(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))


class ContextUNet(Network):
    """The UNet of Conditional_Diffusion_MNIST, by `ContextUNetConfig`.

    Batch normalisation takes the stored statistics in eval mode. The embedding of the label multiplies the
    features on the way up, and that of the time is added. The label enters as minus its one-hot vector, and
    no label as zeros.
    """

    Config = ContextUNetConfig
    config: ContextUNetConfig

    def __init__(self, config: ContextUNetConfig):
        super().__init__()
        config.check_size(config.image_shape)
        self.config = config
        width, window = config.channels, config.pool
        self.input = ConvPair(config.in_channels, width, residual=True)
        self.down1 = ConvPair(width, width)
        self.down2 = ConvPair(width, 2 * width)
        self.time1, self.time2 = _embedding(1, 2 * width), _embedding(1, width)
        self.label1 = _embedding(config.num_classes, 2 * width)
        self.label2 = _embedding(config.num_classes, width)
        self.unpool = nn.ConvTranspose2d((6 if config.concatenate else 2) * width, 2 * width, window, window)
        self.unpool_norm = nn.GroupNorm(8, 2 * width)
        self.up1 = Up(4 * width, width, ConvPair)
        self.up2 = Up(2 * width, width, ConvPair)
        self.output = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.ReLU(),
            nn.Conv2d(width, config.in_channels, 3, padding=1),
        )

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """The prediction [B, in_channels, H, W] for noisy images x [B, in_channels, H, W].

        timesteps: [B], integers 0..T, or floating-point fractions of T in [0, 1]. labels: int64 [B] in
        0..K-1, or K for no label; None for no label in the whole batch. backend: unused, as all is plain
        PyTorch. ValueError for arguments that do not fit the configuration.
        """
        check_arguments(self.config, x, timesteps, labels)
        dtype = self.unpool.weight.dtype
        time = time_fraction(timesteps, self.config.num_timesteps)[:, None].to(dtype)
        classes = self.config.num_classes
        if labels is None:
            one_hot = time.new_zeros(len(time), classes)
        else:
            one_hot = F.one_hot(labels.long(), classes + 1)[:, :classes].to(dtype)
        time1, time2 = (embed(time)[:, :, None, None] for embed in (self.time1, self.time2))
        label1, label2 = (embed(-one_hot)[:, :, None, None] for embed in (self.label1, self.label2))

        x = self.input(x.to(dtype).contiguous())
        down1 = F.max_pool2d(self.down1(x), 2)
        down2 = F.max_pool2d(self.down2(down1), 2)
        h = F.gelu(F.avg_pool2d(down2, self.config.pool))
        if self.config.concatenate:
            h = torch.cat([h, *(e.expand(-1, -1, *h.shape[2:]) for e in (time1, label1))], dim=1)
        h = F.relu(self.unpool_norm(self.unpool(h)))
        h = self.up1(label1 * h + time1, down2)
        h = self.up2(label2 * h + time2, down1)
        return self.output(torch.cat([h, x], dim=1))
