"""The UNet of lucidrains' denoising-diffusion-pytorch: linear attention, memory tokens, self-conditioning.

It has two residual blocks and one attention at each level on either way, and both blocks leave a skip
connection, the second after the attention.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import attention
from ..utils.validation import choice, refuse
from .arguments import check_arguments
from .blocks import Conv2d, Norm, module_list, run
from .network import MAX_CHANNELS, Network, NetworkConfig, check_halvings


@dataclass(frozen=True)
class LucidrainsConfig(NetworkConfig):
    """The architecture of a `LucidrainsUNet`. The defaults are those of version 2 of the original.

    Level i has feature maps with sides of sample_size / 2**i. It takes level_channels[i] channels and gives
    level_channels[i + 1] to the next.

    sample_size: height and width of the images, or one integer for both; divisible by 2**(levels - 1).
    in_channels, out_channels: channels of the images and of the output; out_channels = 2 * in_channels means
        a learned variance.
    channels, channel_mult: the base width, and its multiple behind each level.
    init_channels: channels after the first convolution; None for `channels`.
    self_condition: the network also sees the x_0 that was predicted in the step before (Chen et al. 2022,
        arXiv 2208.04202, section 2.2).
    full_attention: for each level, whether its attention is between all pairs of positions, or linear in
        their number (Shen et al. 2018, arXiv 1812.01243).
    num_heads, head_channels: number and width of the attention heads, for each level and then for the middle.
    memory_tokens: keys and values of each attention that are parameters; 0 for none.
    attention_norm: "rms" or "layer", over the channels of each position, before attention and after linear
        attention.
    qk_norm_scale: scale of full attention whose queries and keys are divided, channel by channel, by their
        norm over the positions; None for plain attention.
    mean_values: linear attention divides its values by the number of positions.
    norm_groups: groups of the blocks' group normalisation; None for an RMS norm over the channels.
    downsample: "unshuffle" (2x2 pixels become channels, then a 1x1 convolution) or "conv" (4x4, stride 2).
    fourier_channels: 1 less than the width of a time embedding with frequencies that are parameters; None for
        fixed frequencies, theta ** (-i / (channels / 2 - 1)).
    dropout: probability in the first half of every residual block.
    num_classes: number K of classes, or None for an unconditional model.
    has_null_label: row K of the label embedding stands for no label.
    """

    sample_size: int | tuple[int, int] = 128
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    init_channels: int | None = None
    self_condition: bool = False
    full_attention: tuple[bool, ...] = (False, False, False, True)
    num_heads: tuple[int, ...] = (4, 4, 4, 4, 4)
    head_channels: tuple[int, ...] = (32, 32, 32, 32, 32)
    memory_tokens: int = 4
    attention_norm: str = "rms"
    qk_norm_scale: float | None = None
    mean_values: bool = False
    norm_groups: int | None = None
    downsample: str = "unshuffle"
    fourier_channels: int | None = None
    theta: float = 10000.0
    dropout: float = 0.0
    num_classes: int | None = None
    has_null_label: bool = True
    bounds: ClassVar[dict[str, dict[str, float]]] = {
        "channels": {"least": 4, "most": MAX_CHANNELS},
        "channel_mult": {"least": 1, "most": 1024},
        "memory_tokens": {"least": 0, "most": MAX_CHANNELS},
        "qk_norm_scale": {"above": 0, "most": 1e6},
        "theta": {"above": 0, "most": 1e12},
        "dropout": {"least": 0, "below": 1},
        "num_classes": {"least": 1, "most": 2**31 - 1},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.channel_mult)
        if levels == 0:
            refuse("channel_mult", "a number for each of at least one level", [])
        for name, count in (
            ("full_attention", levels),
            ("num_heads", levels + 1),
            ("head_channels", levels + 1),
        ):
            if len(getattr(self, name)) != count:
                refuse(name, f"{count} values for {levels} levels", list(getattr(self, name)))
        if self.channels % 2 or (self.fourier_channels or 0) % 2:
            refuse("channels and fourier_channels", "even", [self.channels, self.fourier_channels])
        choice("attention_norm", self.attention_norm, tuple(_CHANNEL_NORMS))
        choice("downsample", self.downsample, ("unshuffle", "conv"))
        self.check_size(self.image_shape)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels that enter each level, and at the end those of the middle."""
        return (self.init_channels or self.channels, *(self.channels * mult for mult in self.channel_mult))

    @property
    def embedding_channels(self) -> int:
        """Width of the embedding of timestep and label, of which each has 4 * channels."""
        return 4 * self.channels * (1 if self.num_classes is None else 2)

    def check_size(self, size: Sequence[int]) -> None:
        """ValueError unless images of this height and width can be halved between all levels."""
        check_halvings(size, len(self.channel_mult) - 1)


class LucidrainsUNet(Network):
    """The UNet of denoising-diffusion-pytorch, by `LucidrainsConfig`, with labels also that of its
    classifier-free guidance."""

    Config = LucidrainsConfig
    config: LucidrainsConfig
    down: Sequence["Level"]  # an nn.ModuleList, as `up` is
    up: Sequence["Level"]

    def __init__(self, config: LucidrainsConfig):
        super().__init__()
        self.config = config
        widths, embed = config.level_channels, 4 * config.channels
        if config.fourier_channels is not None:
            self.frequencies = nn.Parameter(torch.randn(config.fourier_channels // 2))
        waves = config.channels if config.fourier_channels is None else config.fourier_channels + 1
        self.time_mlp = nn.Sequential(nn.Linear(waves, embed), nn.GELU(), nn.Linear(embed, embed))
        if config.num_classes is not None:
            rows = config.num_classes + config.has_null_label
            self.label_embedding = nn.Embedding(rows, config.channels)
            self.label_mlp = nn.Sequential(
                nn.Linear(config.channels, embed), nn.GELU(), nn.Linear(embed, embed)
            )
        inputs = config.in_channels * (2 if config.self_condition else 1)
        self.input_conv = Conv2d(inputs, widths[0], 7, padding=3)
        self.down = module_list(
            Level(config, i, widths[i], widths[i], Downsample(config, i)) for i in range(len(widths) - 1)
        )
        self.mid = Level(config, len(widths) - 1, widths[-1], widths[-1], None)
        self.up = module_list(  # up[i] is of the same resolution as down[i]
            Level(config, i, widths[i] + widths[i + 1], widths[i + 1], Upsample(config, i))
            for i in range(len(widths) - 1)
        )
        self.output_block = ResBlock(config, 2 * widths[0], widths[0])
        self.output_conv = Conv2d(widths[0], config.out_channels, 1)

    def embed(self, timesteps: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The embedding [B, E] of timesteps and labels, as `forward` takes them."""
        config, dtype = self.config, self.input_conv.weight.dtype
        t = timesteps.to(torch.float64 if dtype == torch.float64 else torch.float32)[:, None]
        if config.fourier_channels is None:
            half = config.channels // 2
            exponents = torch.arange(half, dtype=t.dtype, device=t.device)
            angles = t * torch.exp(exponents * -(math.log(config.theta) / (half - 1)))
            waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        else:
            angles = t * self.frequencies.to(t.dtype) * 2 * math.pi
            waves = torch.cat([t, angles.sin(), angles.cos()], dim=1)
        embedding = self.time_mlp(waves.to(dtype))
        if config.num_classes is None:
            return embedding
        if labels is None:
            assert config.null_label is not None
            labels = torch.full_like(timesteps, config.null_label, dtype=torch.int64)
        return torch.cat([embedding, self.label_mlp(self.label_embedding(labels))], dim=1)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None = None,
        backend: str = "auto",
        x0_prev: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The prediction [B, out_channels, H, W] for noisy images x [B, in_channels, H, W].

        timesteps: [B], integer or floating point. labels: int64 [B] in 0..K-1, or K for no label; None for no
        label in the whole batch, and always for an unconditional model. backend: of the kernels. x0_prev: the
        x_0 that the step before predicted, like x, for a network with self_condition; None for none.
        ValueError for arguments that do not fit the configuration.
        """
        config = self.config
        check_arguments(config, x, timesteps, labels)
        if x0_prev is not None and (not config.self_condition or x0_prev.shape != x.shape):
            raise ValueError("x0_prev must be like x, and needs a network with self_condition")
        embedding = F.silu(self.embed(timesteps, labels))
        x = x.to(self.input_conv.weight.dtype)
        if config.self_condition:
            x = torch.cat([torch.zeros_like(x) if x0_prev is None else x0_prev.to(x.dtype), x], dim=1)
        h = first = run(self.input_conv, x, backend=backend)  # [B, level_channels[0], H, W]
        skips: list[torch.Tensor] = []
        for level in self.down:
            h = level.block1(h, embedding, backend)
            skips.append(h)
            h = level.block2(h, embedding, backend)
            h = level.attention(h, backend) + h
            skips.append(h)
            h = level.resample(h, backend)
        h = self.mid.block1(h, embedding, backend)
        h = self.mid.attention(h, backend) + h
        h = self.mid.block2(h, embedding, backend)
        for level in reversed(self.up):
            h = level.block1(torch.cat([h, skips.pop()], dim=1), embedding, backend)
            h = level.block2(torch.cat([h, skips.pop()], dim=1), embedding, backend)
            h = level.attention(h, backend) + h
            h = level.resample(h, backend)
        h = self.output_block(torch.cat([h, first], dim=1), embedding, backend)
        return run(self.output_conv, h, backend=backend)


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
