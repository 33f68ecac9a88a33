"""The parts of the UNet of denoising-diffusion-pytorch: levels, residual blocks, norms and attention."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import attention
from .blocks import Conv2d, Norm, run
from .lucidrains_config import LucidrainsConfig


class Level(nn.Module):
    """The parts of one level on one way, or of the middle: two blocks, attention and the change of size.

    index: of the level; that of the middle is the number of levels. Both blocks take `inputs` channels and
    give `outputs`; on the way down and in the middle these are equal.
    """

    resample: nn.Module

    def __init__(
        self, config: LucidrainsConfig, index: int, inputs: int, outputs: int, resample: nn.Module | None
    ):
        super().__init__()
        full = (*config.full_attention, True)[index]
        self.block1 = ResBlock(config, inputs, outputs)
        self.block2 = ResBlock(config, inputs, outputs)
        self.attention = (FullAttention if full else LinearAttention)(config, index, outputs)
        if resample is not None:
            self.resample = resample


class ResBlock(nn.Module):
    """A residual block, whose first normalisation the embedding scales and shifts."""

    def __init__(self, config: LucidrainsConfig, inputs: int, outputs: int):
        super().__init__()
        self.projection = nn.Linear(config.embedding_channels, 2 * outputs)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.norm1 = _block_norm(config, outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        self.norm2 = _block_norm(config, outputs)
        self.skip = Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: torch.Tensor, embedding: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        scale, shift = self.projection(embedding).chunk(2, dim=1)
        h = run(self.conv1, x, backend=backend)
        h = self.dropout(run(self.norm1, h, backend=backend, scale=scale, shift=shift))
        h = run(self.norm2, run(self.conv2, h, backend=backend), backend=backend)
        return h + run(self.skip, x, backend=backend)


def _block_norm(config: LucidrainsConfig, channels: int) -> nn.Module:
    if config.norm_groups is None:
        return RMSNorm(channels, "silu")
    return Norm(channels, config.norm_groups, 1e-5)


class RMSNorm(nn.Module):
    """Root mean square normalisation over the channels of each position (Zhang & Sennrich 2019, arXiv
    1910.07467), with the embedding's scale and shift and the activation after it."""

    def __init__(self, channels: int, activation: str = "none"):
        super().__init__()
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = F.normalize(x, dim=1) * (self.weight * math.sqrt(x.shape[1]))[:, None, None]
        if scale is not None and shift is not None:
            x = x * (scale + 1)[:, :, None, None] + shift[:, :, None, None]
        return F.silu(x) if self.activation == "silu" else x


class LayerNorm(nn.Module):
    """Layer normalisation over the channels of each position (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias).movedim(-1, 1)


_CHANNEL_NORMS: dict[str, type[nn.Module]] = {"rms": RMSNorm, "layer": LayerNorm}


class FullAttention(nn.Module):
    """Attention between all positions; each also attends to the memory, [keys and values, heads, n, D]."""

    def __init__(self, config: LucidrainsConfig, index: int, channels: int):
        super().__init__()
        self.heads, width = config.num_heads[index], config.head_channels[index]
        self.qk_norm = config.qk_norm_scale is not None
        self.scale = width**-0.5 if config.qk_norm_scale is None else config.qk_norm_scale
        self.norm = _CHANNEL_NORMS[config.attention_norm](channels)
        self.qkv = Conv2d(channels, 3 * self.heads * width, 1, bias=False)
        self.proj = Conv2d(self.heads * width, channels, 1)
        self.memory = (
            nn.Parameter(torch.randn(2, self.heads, config.memory_tokens, width))
            if config.memory_tokens
            else None
        )

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """[B, C, H, W], like x."""
        qkv = run(self.qkv, self.norm(x), backend=backend)
        q, k, v = (
            qkv.flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2).unbind(1)
        )  # [B, heads, S, D]
        if self.qk_norm:
            q, k = F.normalize(q, dim=2), F.normalize(k, dim=2)
        memory = 0 if self.memory is None else self.memory.shape[2]
        if self.memory is not None:
            keys, values = self.memory.to(k.dtype).expand(x.shape[0], -1, -1, -1, -1).unbind(1)
            k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
            q = F.pad(q, (0, 0, memory, 0))  # the op takes as many queries as keys
        h = attention(q, k, v, scale=self.scale, backend=backend)[:, :, memory:]
        h = h.transpose(-1, -2).flatten(1, 2).unflatten(2, x.shape[2:])
        return run(self.proj, h, backend=backend)


class LinearAttention(nn.Module):
    """Attention through a summary of all positions and of the memory, [keys and values, heads, D, n].

    Its cost is linear in the number of positions (Shen et al. 2018, arXiv 1812.01243): queries are normalised
    by a softmax over their channels, keys over the positions.
    """

    def __init__(self, config: LucidrainsConfig, index: int, channels: int):
        super().__init__()
        self.heads, width = config.num_heads[index], config.head_channels[index]
        self.scale, self.mean_values = width**-0.5, config.mean_values
        self.norm = _CHANNEL_NORMS[config.attention_norm](channels)
        self.qkv = Conv2d(channels, 3 * self.heads * width, 1, bias=False)
        self.proj = Conv2d(self.heads * width, channels, 1)
        self.proj_norm = _CHANNEL_NORMS[config.attention_norm](channels)
        self.memory = (
            nn.Parameter(torch.randn(2, self.heads, width, config.memory_tokens))
            if config.memory_tokens
            else None
        )

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """[B, C, H, W], like x."""
        qkv = run(self.qkv, self.norm(x), backend=backend)
        q, k, v = qkv.flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)  # [B, heads, D, S]
        scale = self.scale / q.shape[-1] if self.mean_values else self.scale
        if self.memory is not None:
            keys, values = self.memory.to(k.dtype).expand(x.shape[0], -1, -1, -1, -1).unbind(1)
            k, v = torch.cat([keys, k], dim=-1), torch.cat([values, v], dim=-1)
        summary = v @ k.softmax(dim=-1).transpose(-1, -2)  # [B, heads, D of v, D of k]
        h = summary @ (q.softmax(dim=-2) * scale)
        h = h.flatten(1, 2).unflatten(2, x.shape[2:])
        return self.proj_norm(run(self.proj, h, backend=backend))


class Downsample(nn.Module):
    """From level i to the next: halves the resolution. The last level only convolves."""

    def __init__(self, config: LucidrainsConfig, index: int):
        super().__init__()
        inputs, outputs = config.level_channels[index : index + 2]
        self.unshuffles = False
        if index == len(config.channel_mult) - 1:
            self.conv = Conv2d(inputs, outputs, 3, padding=1)
        elif config.downsample == "conv":
            self.conv = Conv2d(inputs, outputs, 4, stride=2, padding=1)
        else:
            self.unshuffles = True
            self.conv = Conv2d(4 * inputs, outputs, 1)

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        return run(self.conv, F.pixel_unshuffle(x, 2) if self.unshuffles else x, backend=backend)


class Upsample(nn.Module):
    """From level i to the one before: doubles the resolution. The first level only convolves."""

    def __init__(self, config: LucidrainsConfig, index: int):
        super().__init__()
        self.doubles = index > 0
        outputs, inputs = config.level_channels[index : index + 2]
        self.conv = Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        if self.doubles:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        return run(self.conv, x, backend=backend)
