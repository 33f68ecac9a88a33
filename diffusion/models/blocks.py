"""The parts of the UNet: residual blocks, attention, changes of resolution, and levels made of them."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..kernels import attention, conv2d, group_norm_silu
from .config import UNetConfig

M = TypeVar("M", bound=nn.Module)


def run(module: nn.Module, *inputs: object, backend: str, **modulation: torch.Tensor) -> torch.Tensor:
    """Calls a part of the network, or a module that a user put in its place.

    backend: passed on to modules that take one, unless it is "auto".
    """
    if backend != "auto" and takes_backend(module):
        return module(*inputs, backend=backend, **modulation)
    return module(*inputs, **modulation)


def takes_backend(module: nn.Module) -> bool:
    """Whether the module's `forward` has an argument `backend`."""
    return _has_backend(vars(module).get("forward") or type(module).forward)


@functools.lru_cache(256)
def _has_backend(function: Callable) -> bool:
    return "backend" in inspect.signature(function).parameters


def _is_torchs(module: nn.Module) -> bool:
    """Whether the module is one of torch.nn. Those take one input and no embedding."""
    return type(module).__module__.startswith("torch.nn.modules.")


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    """The activation of this name, see `UNetConfig.activation`, of x."""
    return getattr(F, name)(x)


# The methods of torch.nn.Conv2d at import, to notice a later replacement.
_FORWARD, _CONV_FORWARD = nn.Conv2d.forward, nn.Conv2d._conv_forward


class Conv2d(nn.Conv2d):
    """A convolution by `kernels.conv2d`, with a square kernel. backend: "reference" is plain PyTorch.

    `torch.nn.Conv2d` computes all that the op does not have, such as dilation, groups and padding modes, and
    a convolution whose `_conv_forward` was replaced, as for images that are seamless in one direction.
    """

    padding: tuple[int, ...]  # a name of PyTorch's, such as "same", is left to torch.nn.Conv2d

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        if not self._is_plain():
            return super().forward(x)
        backend = "reference" if backend == "reference" else "auto"
        stride, padding = self.stride[0], self.padding[0]
        return conv2d(x, self.weight, self.bias, stride=stride, padding=padding, backend=backend)

    def _is_plain(self) -> bool:
        # Written so that torch.compile follows it: it does not see the function of a bound method.
        replaced = "_conv_forward" in self.__dict__ or type(self)._conv_forward is not _CONV_FORWARD
        if replaced or nn.Conv2d.forward is not _FORWARD:
            return False
        pairs = (self.stride, self.padding)
        square = all(isinstance(pair, tuple) and pair[0] == pair[-1] for pair in pairs)
        return square and (self.padding_mode, self.dilation, self.groups) == ("zeros", (1, 1), 1)


class Norm(nn.Module):
    """Group normalisation with the embedding and activation after it; see `kernels.group_norm_silu`.

    activation: "none", or a name of `config.ACTIVATIONS`; the kernel computes "silu" itself.
    """

    def __init__(self, channels: int, groups: int, eps: float, activation: str = "silu"):
        super().__init__()
        if channels % groups:
            raise ValueError(f"{channels} channels cannot be divided into {groups} normalisation groups")
        self.groups, self.eps, self.activation = groups, eps, activation
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, backend: str = "auto", **modulation: torch.Tensor) -> torch.Tensor:
        fused = self.activation in ("silu", "none")
        h = group_norm_silu(
            x,
            self.groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation if fused else "none",
            backend=backend,
            **modulation,
        )
        return h if fused else activate(self.activation, h)


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
        return run(self.conv, F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x, backend=backend)


class Upsample(nn.Module):
    """Doubles the resolution by nearest-neighbour interpolation, and convolves if `conv`."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1) if conv else None

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else run(self.conv, x, backend=backend)


class ResBlock(nn.Module):
    """Residual block (Ho et al. 2020, appendix B). It can change the resolution between its first
    normalisation and convolution (Song et al. 2021, arXiv 2011.13456, appendix H).

    embedding: [B, out], added before the second normalisation, or [B, 2 out], its scale and shift.
    divisor: the block's output is divided by it.
    checkpointing: keep only the input, and recompute all activations in the backward pass (Chen et al.
    2016, arXiv 1604.06174).
    """

    checkpointing = False

    def __init__(
        self,
        config: UNetConfig,
        in_channels: int,
        out_channels: int,
        resample: Downsample | Upsample | None = None,
        divisor: float = 1,
    ):
        super().__init__()
        self.scale_shift, self.dropout, self.resample = config.scale_shift, config.dropout, resample
        self.embedding_size = out_channels * (2 if config.scale_shift else 1)
        self.divisor = divisor
        self.norm1 = Norm(in_channels, config.norm_groups, config.norm_eps, config.activation)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = Norm(out_channels, config.norm_groups, config.norm_eps, config.activation)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, embedding, backend, use_reentrant=False)
        return self._forward(x, embedding, backend)

    def _forward(self, x: torch.Tensor, embedding: torch.Tensor, backend: str) -> torch.Tensor:
        h = run(self.norm1, x, backend=backend)
        if self.resample is not None:
            x, h = run(self.resample, x, backend=backend), run(self.resample, h, backend=backend)
        h = run(self.conv1, h, backend=backend)
        h = self._modulated(h, embedding, backend)
        h = run(self.conv2, F.dropout(h, self.dropout, self.training), backend=backend)
        h = h + (x if self.skip is None else run(self.skip, x, backend=backend))
        return h if self.divisor == 1 else h / self.divisor

    def _modulated(self, h: torch.Tensor, embedding: torch.Tensor, backend: str) -> torch.Tensor:
        """The second normalisation with the embedding, also if a module of torch.nn replaces the norm."""
        if not self.scale_shift:
            if _is_torchs(self.norm2):
                return self.norm2(h + embedding[:, :, None, None])
            return run(self.norm2, h, backend=backend, add=embedding)
        scale, shift = embedding.chunk(2, dim=1)
        if _is_torchs(self.norm2):
            return self.norm2(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
        return run(self.norm2, h, backend=backend, scale=scale, shift=shift)


def module_list(modules: Iterable[M]) -> Sequence[M]:
    """An nn.ModuleList that type checkers know the modules of."""
    return cast(Sequence[M], nn.ModuleList(modules))


Resample = ResBlock | Downsample | Upsample  # a change of resolution between two levels


class Attention(nn.Module):
    """Self-attention over all positions, with a residual connection (Ho et al. 2020, appendix B).

    qkv's outputs are ordered by (q, k, v), then by head, then by channel within the head.
    divisor, checkpointing: as in `ResBlock`.
    """

    checkpointing = False

    def __init__(self, config: UNetConfig, channels: int, groups: int | None = None, divisor: float = 1):
        super().__init__()
        self.divisor = divisor
        self.heads = config.num_heads
        if config.head_channels is not None:
            self.heads = max(1, channels // config.head_channels)
        width = config.head_channels or channels // self.heads
        inner = self.heads * width
        if inner != channels and not (config.narrow_attention and inner < channels):
            raise ValueError(f"{channels} channels cannot be divided into attention heads of width {width}")
        groups = config.norm_groups if groups is None else groups
        self.norm = Norm(channels, groups, config.norm_eps, "none") if groups else None
        self.qkv = nn.Linear(channels, 3 * inner)
        self.proj = nn.Linear(inner, channels)

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(self._forward, x, backend, use_reentrant=False)
        return self._forward(x, backend)

    def _forward(self, x: torch.Tensor, backend: str) -> torch.Tensor:
        h = x if self.norm is None else run(self.norm, x, backend=backend)
        h = x + self.attend(h, backend).transpose(1, 2).reshape(x.shape)
        return h if self.divisor == 1 else h / self.divisor

    def attend(self, h: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """The module's output [B, H * W, C] for normalised features h [B, C, H, W], without the residual."""
        qkv = self.qkv(h.flatten(2).transpose(1, 2))  # [B, H * W, 3 inner]; no copy where h is channels_last
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(q, k, v, backend=backend).transpose(1, 2).flatten(2))


class Level(nn.Module):
    """The blocks of one resolution, each with attention or without, and the change of resolution after them.

    inputs: the input channels of each block. way: "down" or "up". resampling: the kind of change, "conv",
    "resblock" or "plain"; None for none.
    """

    blocks: Sequence[ResBlock]
    attentions: Sequence[Attention]
    resample: Resample | None

    def __init__(
        self,
        config: UNetConfig,
        inputs: list[int],
        channels: int,
        attend: bool,
        *,
        way: str,
        resampling: str | None,
    ):
        super().__init__()
        self.way = way
        self.resamples_by_block = resampling == "resblock"
        self.blocks = module_list(ResBlock(config, width, channels) for width in inputs)
        self.attentions = module_list(Attention(config, channels) for _ in inputs if attend)
        conv = resampling == "conv"
        if resampling is None:
            self.resample = None
        elif resampling == "resblock":
            change = Downsample(channels, conv) if way == "down" else Upsample(channels, conv)
            self.resample = ResBlock(config, channels, channels, change)
        elif way == "down":
            self.resample = Downsample(channels, conv, config.downsample_padding)
        else:
            self.resample = Upsample(channels, conv)

    def residual_blocks(self) -> list[ResBlock]:
        """The blocks that take an embedding, in the order in which `forward` calls them."""
        return [*self.blocks, *([self.resample] if isinstance(self.resample, ResBlock) else [])]

    def forward(
        self, h: torch.Tensor, parts: Iterator[torch.Tensor], skips: list[torch.Tensor], backend: str = "auto"
    ) -> torch.Tensor:
        """The features h [B, C, H, W] after this level.

        parts: the part of the embedding for each residual block of the network, in order. skips: on the way
        down, the output of each block and of the resampling is appended; on the way up, each block takes one.
        """
        down = self.way == "down"
        for i, block in enumerate(self.blocks):
            h = h if down else torch.cat([h, skips.pop()], dim=1)
            h = _residual(block, h, next(parts), backend)
            if len(self.attentions):
                h = run(self.attentions[i], h, backend=backend)
            if down:
                skips.append(h)
        if self.resample is not None:
            if self.resamples_by_block:
                h = _residual(self.resample, h, next(parts), backend)
            else:
                h = run(self.resample, h, backend=backend)
        if down and self.resample is not None:
            skips.append(h)
        return h


def _residual(block: nn.Module, h: torch.Tensor, part: torch.Tensor, backend: str) -> torch.Tensor:
    """Calls a residual block, or a module that replaced it; modules of torch.nn take no embedding."""
    return run(block, *((h,) if _is_torchs(block) else (h, part)), backend=backend)


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution; nothing without `config.has_middle`."""

    blocks: Sequence[ResBlock]
    attention: Attention | None

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        count, divisor = 2 if config.has_middle else 0, config.mid_divisor
        self.blocks = module_list(ResBlock(config, channels, channels, divisor=divisor) for _ in range(count))
        attends = config.has_middle and config.mid_attention
        self.attention = (
            Attention(config, channels, config.mid_attention_groups, divisor) if attends else None
        )

    def residual_blocks(self) -> list[ResBlock]:
        """The blocks that take an embedding, in the order in which `forward` calls them."""
        return list(self.blocks)

    def forward(self, h: torch.Tensor, parts: Iterator[torch.Tensor], backend: str = "auto") -> torch.Tensor:
        if not len(self.blocks):
            return h
        h = _residual(self.blocks[0], h, next(parts), backend)
        if self.attention is not None:
            h = run(self.attention, h, backend=backend)
        return _residual(self.blocks[1], h, next(parts), backend)
