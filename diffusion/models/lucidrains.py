"""The UNet of lucidrains' denoising-diffusion-pytorch: linear attention, memory tokens, self-conditioning.

It has two residual blocks and one attention at each level on either way, and both blocks leave a skip
connection, the second after the attention.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .arguments import check_arguments
from .blocks import Conv2d, module_list, run
from .lucidrains_blocks import Downsample, Level, ResBlock, Upsample
from .lucidrains_config import LucidrainsConfig
from .network import Network


class LucidrainsUNet(Network):
    """The UNet of denoising-diffusion-pytorch, by `LucidrainsConfig`, with labels also that of its
    classifier-free guidance."""

    Config = LucidrainsConfig
    config: LucidrainsConfig
    down: Sequence[Level]  # an nn.ModuleList, as `up` is
    up: Sequence[Level]

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
