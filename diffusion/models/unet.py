"""UNet: the network of DDPM, improved DDPM and guided diffusion (ADM)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..utils.memory import check_fits
from .blocks import Attention, Level, Middle, Norm, ResBlock, module_list, run
from .config import UNetConfig
from .network import Network, NetworkConfig

__all__ = ["UNet", "UNetConfig", "timestep_embedding"]


def timestep_embedding(
    timesteps: torch.Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float
) -> torch.Tensor:
    """Sinusoidal embedding [B, dim] of floating-point timesteps [B], in their dtype (Vaswani et al. 2017,
    section 3.5).

    Sines first, or cosines with flip_sin_to_cos; the frequencies are 10000 ** (-i / (dim / 2 - freq_shift))
    for i = 0..dim/2-1.
    """
    half = dim // 2
    exponents = torch.arange(half, dtype=timesteps.dtype, device=timesteps.device) * -math.log(10000.0)
    angles = timesteps[:, None] * torch.exp(exponents / (half - freq_shift))
    waves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(waves, dim=1)


class UNet(Network):
    """The UNet of DDPM, improved DDPM and guided diffusion, by `UNetConfig`.

    `forward` is `denoise(x, embed(timesteps, labels))`: `embed` holds all that depends on
    timestep and label alone, so that a sampler can compute it once for all steps.
    """

    Config: ClassVar[type[NetworkConfig]] = UNetConfig
    config: UNetConfig
    down: Sequence[Level]  # an nn.ModuleList, as `up` is
    up: Sequence[Level]

    def __init__(self, config: UNetConfig):
        super().__init__()
        device = torch.get_default_device()
        if device.type != "meta":
            check_fits(f"{config.num_parameters:,} parameters", 4 * config.num_parameters, device)
        self.config = config
        widths, embed_dim = config.level_channels, config.time_embed_dim or 4 * config.channels
        self.time_mlp = nn.Sequential(
            nn.Linear(config.channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        if config.num_classes is not None:
            self.label_embedding = nn.Embedding(config.num_classes + config.has_null_label, embed_dim)
        pixels = config.patch_size**2
        self.input_conv = nn.Conv2d(pixels * config.in_channels, widths[0], 3, padding=1)

        width, skips = widths[0], [widths[0]]
        down = []
        for i, how in enumerate(config.level_downsample):
            inputs = [width, *[widths[i]] * (config.level_blocks[i] - 1)]
            down.append(
                Level(config, inputs, widths[i], i in config.attention_levels, way="down", resampling=how)
            )
            width = widths[i]
            skips += [width] * (config.level_blocks[i] + (how is not None))
        self.down = module_list(down)
        self.mid = Middle(config, width)
        up = []
        for i, how in reversed(list(enumerate(config.level_upsample))):
            outputs = [widths[i]] * (config.level_blocks[i] + 1)
            inputs = [before + skips.pop() for before in (width, *outputs[1:])]
            up.append(
                Level(config, inputs, widths[i], i in config.attention_levels, way="up", resampling=how)
            )
            width = widths[i]
        self.up = module_list(reversed(up))  # up[i] is of the same resolution as down[i]
        self.output_norm = Norm(width, config.norm_groups, config.norm_eps)
        self.output_conv = nn.Conv2d(width, pixels * config.out_channels, 3, padding=1)

        parts: list[Level | Middle] = [*self.down, self.mid, *up]
        self.embedding_sizes = [block.embedding_size for part in parts for block in part.residual_blocks()]
        self.embedding_projection = nn.Linear(embed_dim, sum(self.embedding_sizes))
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        """DDPM's: Glorot-uniform weights, zero biases; zero weights at the end of branches and network."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # A matrix that holds several weights: each gets its own fan-out.
        several = [m.qkv.weight.chunk(3) for m in self.modules() if isinstance(m, Attention)]
        for weights in (*several, self.embedding_projection.weight.split(self.embedding_sizes)):
            for weight in weights:
                nn.init.xavier_uniform_(weight)
        ends = [
            m.proj if isinstance(m, Attention) else m.conv2
            for m in self.modules()
            if isinstance(m, Attention | ResBlock)
        ]
        for module in (*ends, self.output_conv):
            nn.init.zeros_(module.weight)

    def embed(self, timesteps: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """The embedding of timesteps and labels for all blocks, [B, E], for `denoise`.

        timesteps: [B], integer or floating point, 0..T-1. labels: int64 [B] in 0..K-1, or K for no label;
        None for no label in the whole batch. ValueError for labels outside of these.
        """
        config = self.config
        if timesteps.ndim != 1:
            raise ValueError(f"timesteps must have shape [B], not {list(timesteps.shape)}")
        dtype = _dtype_of(self.time_mlp, torch.float32)
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        waves = timestep_embedding(
            timesteps.to(precise) * config.timestep_scale,
            config.channels,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
        embedding = self.time_mlp(waves.to(dtype))
        if config.num_classes is not None:
            if labels is None:
                if config.null_label is None:
                    raise ValueError("this model was trained without a null label, so it needs labels")
                labels = torch.full_like(timesteps, config.null_label, dtype=torch.int64)
            self._check_labels(labels, timesteps, config.num_classes + config.has_null_label)
            embedding = embedding + self.label_embedding(labels)
        elif labels is not None:
            raise ValueError("this model is unconditional; labels must be None")
        return self.embedding_projection(nn.functional.silu(embedding))

    def _check_labels(self, labels: torch.Tensor, timesteps: torch.Tensor, rows: int) -> None:
        """ValueError unless labels are integers [B] in 0..rows-1, as far as the values can be read."""
        if not isinstance(labels, torch.Tensor):
            raise ValueError(
                f"labels must be a tensor of integers {list(timesteps.shape)}, not {type(labels).__name__}"
            )
        if labels.shape != timesteps.shape or labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"labels must be integers of shape {list(timesteps.shape)}, "
                f"not {labels.dtype} {list(labels.shape)}"
            )
        # Reading the values waits for the device; a compiled or captured model cannot wait.
        if torch.compiler.is_compiling():
            return
        while torch._C._functorch.is_functorch_wrapped_tensor(labels):
            labels = torch._C._functorch.get_unwrapped(labels)  # vmap passes one label; this is the batch
        if labels.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if labels.numel() and not bool(((labels >= 0) & (labels < rows)).all()):
            null = "" if self.config.null_label is None else f" ({self.config.null_label} for no label)"
            raise ValueError(f"labels must be in 0..{rows - 1}{null}, not {labels.min()}..{labels.max()}")

    def denoise(self, x: torch.Tensor, embedding: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """The network's output [B, out_channels, H, W] for x [B, in_channels, H, W] and `embed`'s [B, E].

        x is cast to the parameters' dtype, and the output has that dtype. backend: of the kernels. ValueError
        for a wrong shape, or a backend that cannot serve.
        """
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise ValueError(f"x must have shape [B, {self.config.in_channels}, H, W], not {list(x.shape)}")
        self.config.check_size(x.shape[2:])
        if embedding.shape != (x.shape[0], sum(self.embedding_sizes)):
            expected = [x.shape[0], sum(self.embedding_sizes)]
            raise ValueError(
                f"embedding must have shape {expected} for {len(x)} images, not {list(embedding.shape)}"
            )
        parts = iter(embedding.split(self.embedding_sizes, dim=1))  # one for each residual block
        x = x.to(_dtype_of(self.input_conv, x.dtype))
        x = pixel_unshuffle(x, self.config.patch_size)  # [B, P P in_channels, H / P, W / P] for patch_size P
        h = self.input_conv(x)  # [B, channels, H / P, W / P]
        skips = [h]
        for level in self.down:  # each level's resampling halves height and width
            h = run(level, h, parts, skips, backend=backend)
        h = run(self.mid, h, parts, backend=backend)
        for level in reversed(self.up):  # each level's resampling doubles height and width
            h = run(level, h, parts, skips, backend=backend)
        h = run(self.output_norm, h, backend=backend)
        output = self.output_conv(h)  # [B, P P out_channels, H / P, W / P]
        return pixel_shuffle(output, self.config.patch_size)  # [B, out_channels, H, W]

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Trades time for memory in training: blocks keep only their inputs; a step takes a third longer."""
        for module in self.modules():
            if isinstance(module, ResBlock | Attention):
                module.checkpointing = enabled

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """The prediction [B, out_channels, H, W] for noisy images x [B, in_channels, H, W].

        timesteps: [B], integer or floating point. labels: int64 [B] in 0..K-1, or K for no label; None for no
        label in the whole batch, and always for an unconditional model. backend: of the kernels. ValueError
        for arguments that do not fit the configuration.
        """
        embedding = self.embed(timesteps, labels)
        return self.denoise(x, embedding) if backend == "auto" else self.denoise(x, embedding, backend)


def _dtype_of(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of the module's parameters; `otherwise` for a module without any."""
    parameter = next(module.parameters(), None)
    return otherwise if parameter is None else parameter.dtype
