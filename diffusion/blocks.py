"""The parts of the UNet: residual blocks, attention, changes of resolution, and levels made of them."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .kernels import attention, conv2d, group_norm_silu
from .unet_config import UNetConfig


class Conv2d(nn.Conv2d):
    """`kernels.conv2d` with a square kernel; by PyTorch alone if the other ops of the UNet are."""

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        backend = "reference" if backend == "reference" else "auto"
        options = {"stride": self.stride[0], "padding": self.padding[0], "backend": backend}
        return conv2d(x, self.weight, self.bias, **options)


class Norm(nn.Module):
    """Group normalisation with what follows it in a block; see `kernels.group_norm_silu`."""

    def __init__(self, channels: int, groups: int, eps: float, activation: str = "silu"):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into {groups} normalisation groups")
        self.groups, self.eps, self.activation = groups, eps, activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, backend: str = "auto", **modulation: torch.Tensor) -> torch.Tensor:
        options = {"activation": self.activation, "backend": backend}
        return group_norm_silu(x, self.groups, self.weight, self.bias, self.eps, **options, **modulation)


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution, or by average pooling."""

    def __init__(self, channels: int, conv: bool, padding: str = "symmetric"):
        super().__init__()
        self.asymmetric = padding == "asymmetric"
        self.conv = (
            Conv2d(channels, channels, 3, stride=2, padding=0 if self.asymmetric else 1) if conv else None
        )

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x, backend)


class Upsample(nn.Module):
    """Doubles the resolution by nearest-neighbour, and a convolution if `conv`."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x, backend)


class ResBlock(nn.Module):
    """Residual block (Ho et al. 2020, appendix B), that can change the resolution between its first
    normalisation and convolution (Song et al. 2021, arXiv 2011.13456, appendix H).

    embedding: [B, out], added before the second normalisation, or [B, 2 out], its scale and shift.
    checkpointing: keep the input only, and compute everything between again for the gradient (Chen et al.
    2016, arXiv 1604.06174).
    """

    checkpointing = False

    def __init__(
        self, config: UNetConfig, in_channels: int, out_channels: int, resample: nn.Module | None = None
    ):
        super().__init__()
        self.scale_shift, self.dropout, self.resample = config.scale_shift, config.dropout, resample
        self.embedding_size = out_channels * (2 if config.scale_shift else 1)
        self.norm1 = Norm(in_channels, config.norm_groups, config.norm_eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Norm(out_channels, config.norm_groups, config.norm_eps)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, embedding, backend, use_reentrant=False)
        return self._forward(x, embedding, backend)

    def _forward(self, x: torch.Tensor, embedding: torch.Tensor, backend: str) -> torch.Tensor:
        h = self.norm1(x, backend)
        if self.resample is not None:
            x, h = self.resample(x, backend), self.resample(h, backend)
        h = self.conv1(h, backend)
        if self.scale_shift:
            scale, shift = embedding.chunk(2, dim=1)
            h = self.norm2(h, backend, scale=scale, shift=shift)
        else:
            h = self.norm2(h, backend, add=embedding)
        h = self.conv2(F.dropout(h, self.dropout, self.training), backend)
        return h + (x if self.skip is None else self.skip(x, backend))


class Attention(nn.Module):
    """Self-attention over all positions, with a residual connection (Ho et al. 2020, appendix B).

    qkv's outputs are ordered by (q, k, v), then by head, then by channel within the head.
    checkpointing: as in `ResBlock`.
    """

    checkpointing = False

    def __init__(self, config: UNetConfig, channels: int, groups: int | None = None):
        super().__init__()
        self.heads = config.num_heads
        if config.head_channels is not None:
            self.heads = max(1, channels // config.head_channels)
        width = config.head_channels or channels // self.heads
        if channels != self.heads * width:
            raise ValueError(f"{channels} channels cannot be divided into attention heads of width {width}")
        groups = config.norm_groups if groups is None else groups
        self.norm = Norm(channels, groups, config.norm_eps, "none") if groups else None
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, backend, use_reentrant=False)
        return self._forward(x, backend)

    def _forward(self, x: torch.Tensor, backend: str) -> torch.Tensor:
        h = x if self.norm is None else self.norm(x, backend)
        qkv = self.qkv(h.flatten(2).transpose(1, 2))  # [B, H * W, 3 C]; no copy where x is channels_last
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        h = self.proj(attention(q, k, v, backend=backend).transpose(1, 2).flatten(2))
        return x + h.transpose(1, 2).reshape(x.shape)


class Level(nn.Module):
    """The blocks of one resolution on the way down or up, each with attention or without, and what follows.

    inputs: the input channels of each block. down, up: how the level is left: "conv", "resblock", "plain",
    or None.
    """

    def __init__(
        self,
        config: UNetConfig,
        inputs: list[int],
        channels: int,
        attend: bool,
        down: str | None = None,
        up: str | None = None,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(config, width, channels) for width in inputs)
        self.attentions = nn.ModuleList(Attention(config, channels) for _ in inputs if attend)
        if down == "resblock":
            self.resample = ResBlock(config, channels, channels, Downsample(channels, conv=False))
        elif up == "resblock":
            self.resample = ResBlock(config, channels, channels, Upsample(channels, conv=False))
        elif down is not None:
            self.resample = Downsample(channels, down == "conv", config.downsample_padding)
        elif up is not None:
            self.resample = Upsample(channels, up == "conv")
        else:
            self.resample = None

    def residual_blocks(self) -> list[ResBlock]:
        """The blocks that take an embedding, in the order in which they do."""
        return [*self.blocks, *([self.resample] if isinstance(self.resample, ResBlock) else [])]

    def _block(self, i: int, h: torch.Tensor, parts: Iterator[torch.Tensor], backend: str) -> torch.Tensor:
        h = self.blocks[i](h, next(parts), backend)
        return self.attentions[i](h, backend) if len(self.attentions) else h

    def _leave(self, h: torch.Tensor, parts: Iterator[torch.Tensor], backend: str) -> torch.Tensor:
        if isinstance(self.resample, ResBlock):
            return self.resample(h, next(parts), backend)
        return self.resample(h, backend)

    def descend(
        self, h: torch.Tensor, parts: Iterator[torch.Tensor], skips: list[torch.Tensor], backend: str = "auto"
    ) -> torch.Tensor:
        """On the way down: appends the output of every step to `skips`."""
        for i in range(len(self.blocks)):
            h = self._block(i, h, parts, backend)
            skips.append(h)
        if self.resample is not None:
            h = self._leave(h, parts, backend)
            skips.append(h)
        return h

    def ascend(
        self, h: torch.Tensor, parts: Iterator[torch.Tensor], skips: list[torch.Tensor], backend: str = "auto"
    ) -> torch.Tensor:
        """On the way up: takes one of `skips` into each block."""
        for i in range(len(self.blocks)):
            h = self._block(i, torch.cat([h, skips.pop()], dim=1), parts, backend)
        return h if self.resample is None else self._leave(h, parts, backend)


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(config, channels, channels) for _ in range(2))
        self.attention = (
            Attention(config, channels, config.mid_attention_groups) if config.mid_attention else None
        )

    def residual_blocks(self) -> list[ResBlock]:
        """The blocks that take an embedding, in the order in which they do."""
        return list(self.blocks)

    def forward(self, h: torch.Tensor, parts: Iterator[torch.Tensor], backend: str = "auto") -> torch.Tensor:
        h = self.blocks[0](h, next(parts), backend)
        if self.attention is not None:
            h = self.attention(h, backend)
        return self.blocks[1](h, next(parts), backend)
