"""DiagonalUNet: the networks of juraam/stable-diffusion-from-scratch, with and without labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..utils.validation import refuse
from .arguments import check_arguments
from .blocks import module_list
from .network import Network, NetworkConfig, check_halvings

MAX_LEVELS = 16
GROUPS = 8  # of every group normalisation
SCORES = 2**18  # attention scores of one image that exist at a time


@dataclass(frozen=True)
class DiagonalUNetConfig(NetworkConfig):
    """The architecture of a `DiagonalUNet`.

    sample_size: height and width of the images, or one integer for both; divisible by 2**(levels - 1).
    in_channels, out_channels: channels of the images and of the output.
    channels, channel_mult: the base width, and its multiple at each level.
    num_res_blocks: number of blocks at each level, on the way down and on the way up.
    down_attention, up_attention: levels with attention after each block on the way down, and on the way up.
    mid_attention: attention between the two middle blocks.
    num_heads: number of attention heads.
    residual: the blocks of the levels add their input, and take the label. The middle blocks never do.
    num_timesteps: T; the table of the time has rows for the timesteps 0..T.
    num_classes: number K of classes, or None. The label K stands for no label.
    """

    bounds: ClassVar = {
        "channels": {"least": 2, "most": 65536},
        "num_res_blocks": {"least": 1, "most": 64},
        "down_attention": {"least": 0, "most": MAX_LEVELS - 1},
        "up_attention": {"least": 0, "most": MAX_LEVELS - 1},
        "num_timesteps": {"least": 1, "most": 2**31 - 1},
        "num_classes": {"least": 1, "most": 2**31 - 1},
    }

    sample_size: int | tuple[int, int] = 28
    in_channels: int = 1
    out_channels: int = 1
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    down_attention: tuple[int, ...] = (1,)
    up_attention: tuple[int, ...] = (1,)
    mid_attention: bool = True
    num_heads: int = 4
    residual: bool = True
    num_timesteps: int = 1000
    num_classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.channel_mult)
        if self.channels % 2:
            refuse("channels", "even", self.channels)
        if not 1 <= levels <= MAX_LEVELS:
            refuse("channel_mult", f"a number for each of 1..{MAX_LEVELS} levels", list(self.channel_mult))
        for name in ("down_attention", "up_attention"):
            if not all(level < levels for level in getattr(self, name)):
                refuse(name, f"in 0..{levels - 1}", list(getattr(self, name)))
        self.check_size(self.image_shape)

    @property
    def has_null_label(self) -> bool:
        """Whether images can be drawn without a label."""
        return self.num_classes is not None

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level on the way down."""
        return tuple(self.channels * mult for mult in self.channel_mult)

    def check_size(self, size: Sequence[int]) -> None:
        """ValueError unless images of this height and width can be halved between all levels."""
        check_halvings(size, len(self.channel_mult) - 1)


def diagonal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """`diag(softmax(q k^T * scale)) v`: each position sees its own value alone, times its weight.

    q, k, v: [B, heads, S, D]. Returns a tensor like v. The weight of position i is exp(s_ii - logsumexp_j
    s_ij) for the scores s = q k^T * scale, in float32 (float64 for float64). The scores are computed for
    some rows at a time, so that S x S numbers never exist together; training computes them again for the
    gradient.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(dtype) * scale, k.to(dtype)
    heads, length = q.shape[1:3]
    rows = max(1, SCORES // (heads * length))
    keys = k.transpose(-1, -2)

    def log_sum(part: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(part @ keys, dim=-1)

    # Compilers choose themselves what they keep for the gradient.
    recompute = torch.is_grad_enabled() and q.requires_grad and not torch.compiler.is_compiling()
    sums = [
        checkpoint(log_sum, part, use_reentrant=False) if recompute else log_sum(part)
        for part in q.split(rows, dim=2)
    ]
    weights = torch.exp((q * k).sum(-1) - torch.cat(sums, dim=2))
    return weights[..., None].to(v.dtype) * v


class DiagonalAttention(nn.Module):
    """`diagonal_attention` of the normalised features, which are added to it, and then a perceptron's output.

    qkv's outputs are ordered by (q, k, v), then by head, then by channel within the head. The scores are
    divided by the root of all channels, not of a head's.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be divided into {heads} attention heads")
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [B, H * W, C]; no copy where x is channels_last
        qkv = self.qkv(self.norm(tokens)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = diagonal_attention(q, k, v, 1 / math.sqrt(x.shape[1]))
        h = self.proj(attended.transpose(1, 2).flatten(2)) + tokens
        h = self.mlp(h) + h
        return h.transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """Two convolutions of the normalised features, with the time, and with the label if `residual`.

    time, label: [B, 4 * channels], the label's multiplied by 0 where there is none after its projection;
    residual: the input is added, too.
    """

    def __init__(self, config: DiagonalUNetConfig, in_channels: int, out_channels: int, residual: bool):
        super().__init__()
        embed_dim = 4 * config.channels
        self.norm1 = nn.GroupNorm(GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_projection = nn.Linear(embed_dim, out_channels)
        labelled = residual and config.num_classes is not None
        self.label_projection = nn.Linear(embed_dim, out_channels) if labelled else None
        self.norm2 = nn.GroupNorm(GROUPS, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = (
            nn.Conv2d(in_channels, out_channels, 1) if residual and in_channels != out_channels else None
        )
        self.residual = residual

    def forward(
        self,
        x: torch.Tensor,
        time: torch.Tensor,
        label: torch.Tensor | None,
        is_labelled: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [B, in_channels, H, W] to [B, out_channels, H, W].

        time, label: [B, 4 * channels], after their ReLU. is_labelled: [B, 1], 0 for images without label.
        """
        h = self.conv1(F.relu(self.norm1(x)))
        added = self.time_projection(time)
        if self.label_projection is not None and label is not None:
            added = added + self.label_projection(label) * is_labelled
        h = F.relu(self.norm2(h + added[:, :, None, None]))
        h = self.conv2(h)
        if not self.residual:
            return h
        return h + (x if self.skip is None else self.skip(x))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention or not."""

    blocks: Sequence[Block]
    attentions: Sequence[DiagonalAttention]

    def __init__(self, config: DiagonalUNetConfig, in_channels: int, out_channels: int, attend: bool):
        super().__init__()
        inputs = [in_channels, *[out_channels] * (config.num_res_blocks - 1)]
        self.blocks = module_list(Block(config, width, out_channels, config.residual) for width in inputs)
        self.attentions = module_list(
            DiagonalAttention(out_channels, config.num_heads) for _ in inputs if attend
        )

    def forward(self, x: torch.Tensor, *embedding: torch.Tensor | None) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, *embedding)
            if len(self.attentions):
                x = self.attentions[i](x)
        return x


class DiagonalUNet(Network):
    """The UNets of stable-diffusion-from-scratch, by `DiagonalUNetConfig`.

    Each level has one skip connection, which is taken after its blocks. Average pooling halves the resolution
    and a transposed convolution doubles it. Attention keeps only the diagonal of its weights.
    """

    Config = DiagonalUNetConfig
    config: DiagonalUNetConfig
    down: Sequence[Level]
    up: Sequence[Level]
    time_table: torch.Tensor
    upsample: Sequence[nn.ConvTranspose2d]

    def __init__(self, config: DiagonalUNetConfig):
        super().__init__()
        self.config = config
        widths, embed_dim = config.level_channels, 4 * config.channels
        self.register_buffer("time_table", _time_table(config.num_timesteps + 1, config.channels))
        self.time_mlp = _embedding_mlp(config.channels, embed_dim)
        if config.num_classes is not None:
            self.label_embedding = nn.Embedding(config.num_classes, config.channels)
            self.label_mlp = _embedding_mlp(config.channels, embed_dim)
        self.input_conv = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = module_list(
            Level(config, before, width, i in config.down_attention)
            for i, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True))
        )
        self.mid_blocks = module_list(Block(config, widths[-1], widths[-1], False) for _ in range(2))
        self.mid_attention = DiagonalAttention(widths[-1], config.num_heads) if config.mid_attention else None
        # The blocks of a level on the way up have the channels of the next finer level.
        outputs = (widths[0], *widths[:-1])
        self.up = module_list(
            Level(config, 2 * width, after, i in config.up_attention)
            for i, (width, after) in enumerate(zip(widths, outputs, strict=True))
        )
        self.upsample = module_list(nn.ConvTranspose2d(width, width, 2, 2) for width in outputs[1:])
        self.output_norm = nn.GroupNorm(GROUPS, widths[0])
        self.output_conv = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """The prediction [B, out_channels, H, W] for noisy images x [B, in_channels, H, W].

        timesteps: [B], 0..T. labels: int64 [B] in 0..K-1, or K for no label; None for no label in the whole
        batch, and always for an unconditional network. backend: unused, as all is plain PyTorch. ValueError
        for arguments that do not fit the configuration.
        """
        check_arguments(self.config, x, timesteps, labels)
        dtype = self.output_conv.weight.dtype
        time = F.relu(self.time_mlp(self._waves(timesteps).to(dtype)))
        label = is_labelled = None
        if labels is not None:
            assert self.config.num_classes is not None
            row = labels.clamp(max=self.config.num_classes - 1)
            label = F.relu(self.label_mlp(self.label_embedding(row)))
            is_labelled = (labels < self.config.num_classes)[:, None].to(dtype)
        embedding = (time, label, is_labelled)

        h = self.input_conv(x.to(dtype).contiguous())
        skips = []
        for i, level in enumerate(self.down):
            h = level(h if i == 0 else F.avg_pool2d(h, 2), *embedding)
            skips.append(h)
        h = self.mid_blocks[0](h, *embedding)
        if self.mid_attention is not None:
            h = self.mid_attention(h)
        h = self.mid_blocks[1](h, *embedding)
        for i, level in reversed(list(enumerate(self.up))):
            h = level(torch.cat([h, skips.pop()], dim=1), *embedding)
            h = h if i == 0 else self.upsample[i - 1](h)
        return self.output_conv(F.relu(self.output_norm(h)))

    def _waves(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Rows of the table [B, channels] for integers, the same waves for timesteps between them."""
        if not timesteps.is_floating_point():
            return self.time_table[timesteps]
        return _waves(timesteps.float(), self.config.channels)


def _embedding_mlp(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))


def _time_table(rows: int, dim: int) -> torch.Tensor:
    return _waves(torch.arange(rows, dtype=torch.float32), dim)


def _waves(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Sine and cosine in turn, [B, dim], of frequencies 10000^(-2 i / dim) (Vaswani et al. 2017, 3.5)."""
    exponents = torch.arange(0, dim, 2, device=timesteps.device) * (-math.log(10000.0) / dim)
    angles = timesteps[:, None] * torch.exp(exponents)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
