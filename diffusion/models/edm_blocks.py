"""The parts of EDM's networks: filters of the resolution, embeddings of noise, residual blocks, levels."""

import functools
import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention
from .blocks import Conv2d, Norm, module_list, run
from .edm_preconditioning import from_fixed, to_fixed

Taps = tuple[float, ...]  # of a filter along one axis, of even length; their sum is 1
BOX = (0.5, 0.5)


def downsample(x: Tensor, taps: Taps, padding: int) -> Tensor:
    """Filters x [B, C, H, W], padded by zeros, along both axes, and keeps every second pixel.

    It is a sum of slices, which needs no tensor of taps on the device of x.
    """
    if taps == BOX and not padding:
        return F.avg_pool2d(x, 2)
    x = F.pad(x, (padding,) * 4)
    for axis in (2, 3):
        span = 2 * ((x.shape[axis] - len(taps)) // 2) + 1
        x = _sum(tap * _every_second(x.narrow(axis, i, span), axis) for i, tap in enumerate(taps))
    return x


def upsample(x: Tensor, taps: Taps) -> Tensor:
    """Doubles height and width of x [B, C, H, W]: puts zeros between the pixels, and filters along both axes.

    The filter is that of `downsample` times 4, which keeps the mean.
    """
    if taps == BOX:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    padding, margin = len(taps) // 2 - 1, len(taps) // 2
    for axis in (2, 3):
        size, phases = x.shape[axis], []
        padded = F.pad(x, (margin, margin) if axis == 3 else (0, 0, margin, margin))
        for phase in (
            0,
            1,
        ):  # pixel 2 p + phase of the output: tap i meets pixel p - (i - phase - padding) / 2
            met = range((phase + padding) % 2, len(taps), 2)
            starts = {i: margin - (i - phase - padding) // 2 for i in met}
            phases.append(_sum(2 * taps[i] * padded.narrow(axis, start, size) for i, start in starts.items()))
        x = torch.stack(phases, axis + 1).flatten(axis, axis + 1)
    return x


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


def _every_second(x: Tensor, axis: int) -> Tensor:
    return x[:, :, ::2] if axis == 2 else x[:, :, :, ::2]


def padding_of(taps: Taps) -> int:
    """Zeros on each side for which `downsample` halves the size exactly."""
    return (len(taps) - 1) // 2


def positional(noise: Tensor, width: int, sines_first: bool) -> Tensor:
    """The sinusoidal embedding [B, width] of c_noise [B].

    DDPM's with sines_first: sines, then cosines, and frequencies from 1 to 1/10000; ADM's without.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=noise.device)
    exponents = exponents / max(half - sines_first, 1)
    angles = noise[:, None] * ((1 / 10000) ** exponents).to(noise.dtype)
    waves = (angles.sin(), angles.cos()) if sines_first else (angles.cos(), angles.sin())
    return torch.cat(waves, dim=1)


class Fourier(nn.Module):
    """Cosines and sines of random frequencies (Tancik et al. 2020, arXiv 2006.10739), [B, 2 n]."""

    fixed_frequencies: Tensor

    def __init__(self, count: int):
        super().__init__()
        frequencies = 16 * torch.randn(count, dtype=torch.float32, device=torch.get_default_device())
        self.register_buffer("fixed_frequencies", to_fixed(frequencies))

    def forward(self, noise: Tensor) -> Tensor:
        frequencies = from_fixed(self.fixed_frequencies, torch.float32)
        angles = noise[:, None] * (2 * math.pi * frequencies).to(noise.dtype)
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class Attention(nn.Module):
    """Self-attention over all positions. qkv's outputs are ordered by (q, k, v), head, and channel."""

    def __init__(self, channels: int, groups: int, eps: float, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = Norm(channels, groups, eps, "none")
        self.qkv = Conv2d(channels, 3 * channels, 1)
        self.proj = Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, backend: str = "auto") -> Tensor:
        qkv = run(self.qkv, run(self.norm, x, backend=backend), backend=backend)
        q, k, v = qkv.flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1)
        h = attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend)
        return run(self.proj, h.transpose(2, 3).reshape(x.shape), backend=backend)


class Block(nn.Module):
    """A residual block, perhaps with a change of resolution and with attention (Karras et al. 2022, appendix
    F.2 and table 7).

    way: "down" or "up" changes the resolution before the first convolution; None keeps it. adaptive: the
    embedding scales and shifts the second normalisation, instead of being added before it. project: the
    branch beside has a 1x1 convolution also where only the resolution changes. heads: of attention; 0 for
    none. skip_scale: factor after each sum.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        embedding: int,
        *,
        way: str | None = None,
        taps: Taps = BOX,
        heads: int = 0,
        adaptive: bool,
        project: bool,
        skip_scale: float,
        eps: float,
        dropout: float,
    ):
        super().__init__()
        self.way, self.taps, self.adaptive = way, taps, adaptive
        self.skip_scale, self.dropout = skip_scale, dropout
        self.norm1 = Norm(inputs, num_groups(inputs), eps)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.embedding = nn.Linear(embedding, outputs * (2 if adaptive else 1))
        self.norm2 = Norm(outputs, num_groups(outputs), eps)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        projects = inputs != outputs or (way is not None and project)
        self.skip = Conv2d(inputs, outputs, 1) if projects else None
        self.attention = Attention(outputs, num_groups(outputs), eps, heads) if heads else None

    def forward(self, x: Tensor, embedding: Tensor, backend: str = "auto") -> Tensor:
        h = run(self.conv1, self._resampled(run(self.norm1, x, backend=backend)), backend=backend)
        vector = self.embedding(embedding)
        if self.adaptive:
            scale, shift = vector.chunk(2, dim=1)
            h = run(self.norm2, h, backend=backend, scale=scale.contiguous(), shift=shift.contiguous())
        else:
            h = run(self.norm2, h, backend=backend, add=vector)
        h = run(self.conv2, F.dropout(h, self.dropout, self.training), backend=backend)
        x = self._resampled(x)
        x = (h + (x if self.skip is None else run(self.skip, x, backend=backend))) * self.skip_scale
        if self.attention is not None:
            x = (x + run(self.attention, x, backend=backend)) * self.skip_scale
        return x

    def _resampled(self, x: Tensor) -> Tensor:
        if self.way is None:
            return x
        return upsample(x, self.taps) if self.way == "up" else downsample(x, self.taps, padding_of(self.taps))


def num_groups(channels: int) -> int:
    """Groups of every normalisation: at most 32, of at least 4 channels."""
    return max(1, min(32, channels // 4))


class EncoderLevel(nn.Module):
    """The blocks of one resolution on the way down; `resample` leads to it from the level before.

    auxiliary: the convolution that adds the image ("skip") or a residual image ("residual") of this
    resolution; None for neither (Song et al. 2021, arXiv 2011.13456, appendix H).
    """

    blocks: Sequence[Block]

    def __init__(self, resample: Block | None, auxiliary: Conv2d | None, blocks: list[Block]):
        super().__init__()
        self.resample, self.auxiliary, self.blocks = resample, auxiliary, module_list(blocks)

    def forward(
        self, h: Tensor, image: Tensor, embedding: Tensor, skips: list[Tensor], backend: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """The features after this level, and its auxiliary image; skips gets the output of each block."""
        if self.resample is not None:
            h = run(self.resample, h, embedding, backend=backend)
            if self.auxiliary is not None:
                h, image = self._add(h, image, backend)
            skips.append(h)
        for block in self.blocks:
            h = run(block, h, embedding, backend=backend)
            skips.append(h)
        return h, image

    def _add(self, h: Tensor, image: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        assert self.resample is not None
        assert self.auxiliary is not None
        taps = self.resample.taps
        if self.auxiliary.kernel_size == (1, 1):  # "skip"
            image = downsample(image, taps, padding_of(taps))
            return h + run(self.auxiliary, image, backend=backend), image
        image = downsample(run(self.auxiliary, image, backend=backend), taps, 0)
        h = (h + image) / math.sqrt(2)
        return h, h


class DecoderLevel(nn.Module):
    """The blocks of one resolution on the way up; `resample` leads to it from the level before.

    outputs: channels of the image that this level adds to the output; None where it adds none.
    """

    blocks: Sequence[Block]

    def __init__(
        self, resample: Block | None, blocks: list[Block], channels: int, outputs: int | None, eps: float
    ):
        super().__init__()
        self.resample, self.blocks = resample, module_list(blocks)
        self.output_norm = None if outputs is None else Norm(channels, num_groups(channels), eps)
        self.output_conv = None if outputs is None else Conv2d(channels, outputs, 3, padding=1)

    def forward(
        self, h: Tensor, image: Tensor | None, embedding: Tensor, skips: list[Tensor], backend: str = "auto"
    ) -> tuple[Tensor, Tensor | None]:
        """The features after this level, and the output so far; each block takes one of skips."""
        if self.resample is not None:
            h = run(self.resample, h, embedding, backend=backend)
            image = None if image is None else upsample(image, self.resample.taps)
        for block in self.blocks:
            h = run(block, torch.cat([h, skips.pop()], dim=1), embedding, backend=backend)
        if self.output_norm is not None and self.output_conv is not None:
            own = run(self.output_conv, run(self.output_norm, h, backend=backend), backend=backend)
            image = own if image is None else own + image
        return h, image
