"""UNet: the network of DDPM, improved DDPM and guided diffusion (ADM)."""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ..utils.memory import check_fits
from ..utils.validation import readable
from .arguments import check_images, check_labels, check_timesteps
from .blocks import Attention, Level, Middle, Norm, ResBlock, activate, module_list, run
from .config import UNetConfig
from .network import Network, NetworkConfig

__all__ = ["UNet", "UNetConfig", "fourier_embedding", "timestep_embedding"]


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


def fourier_embedding(values: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Sines and cosines [B, 2 F] of the logarithms of values [B] > 0 at frequencies [F] (Tancik et al. 2020,
    arXiv 2006.10739, of the logarithm of the noise level as in Song et al. 2021, arXiv 2011.13456)."""
    angles = values.log()[:, None] * frequencies * (2 * math.pi)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


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
        widths, embed_dim = config.level_channels, config.embed_dim
        if config.time_embedding == "fourier":
            frequencies = 16 * torch.randn(config.channels)  # of Song et al.'s networks; fixed in training
            self.time_frequencies = nn.Parameter(frequencies, requires_grad=False)
        elif config.learned_timesteps is not None:
            self.time_table = nn.Embedding(config.learned_timesteps, config.channels)
        self.time_mlp = _mlp(config.time_features, embed_dim)
        if config.label_embedding == "timestep":
            self.label_mlp = _mlp(config.time_features, embed_dim)
        elif config.num_classes is not None:
            self.label_embedding = nn.Embedding(config.num_classes + config.has_null_label, embed_dim)
        pixels = config.patch_size**2
        width = config.input_width or widths[0]
        self.input_conv = nn.Conv2d(pixels * config.in_channels, width, 3, padding=1)

        skips, down = [width], []
        for i, how in enumerate(config.level_downsample):
            inputs = [width, *[widths[i]] * (config.level_blocks[i] - 1)]
            attends = config.level_attention[i][0]
            down.append(Level(config, inputs, widths[i], attends, way="down", resampling=how))
            width = widths[i]
            skips += [width] * (config.level_blocks[i] + (how is not None))
        self.down = module_list(down)
        self.mid = Middle(config, width)
        up = []
        for i, how in reversed(list(enumerate(config.level_upsample))):
            outputs = [widths[i]] * (config.level_blocks[i] + 1)
            inputs = [before + skips.pop() for before in (width, *outputs[1:])]
            attends = config.level_attention[i][1]
            up.append(Level(config, inputs, widths[i], attends, way="up", resampling=how))
            width = widths[i]
        self.up = module_list(reversed(up))  # up[i] is of the same resolution as down[i]
        self.output_norm = Norm(width, config.norm_groups, config.norm_eps)
        self.output_conv = nn.Conv2d(width, pixels * config.out_channels, 3, padding=1)

        parts: list[Level | Middle] = [*self.down, self.mid, *up]
        # One for each residual block, and one for the divisor of a Fourier embedding's output.
        self.embedding_sizes = [block.embedding_size for part in parts for block in part.residual_blocks()]
        self.embedding_projection = nn.Linear(embed_dim, sum(self.embedding_sizes))
        if config.time_embedding == "fourier":
            self.embedding_sizes.append(1)
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
        fourier = self.config.time_embedding == "fourier"
        block_sizes = self.embedding_sizes[:-1] if fourier else self.embedding_sizes
        for weights in (*several, self.embedding_projection.weight.split(block_sizes)):
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
        None for no label in the whole batch; floating point [B, E] for the label_embedding "identity".
        ValueError for labels outside of these, or timesteps that a learned table does not have, if they are
        on the CPU: nothing waits for another device.
        """
        config = self.config
        check_timesteps(timesteps)
        embedding = self.time_mlp(self._time_features(timesteps))
        if config.label_embedding == "identity":
            embedding = embedding + self._checked_vectors(labels, embedding)
        elif config.num_classes is not None:
            if labels is None:
                if config.null_label is None:
                    raise ValueError("this model was trained without a null label, so it needs labels")
                labels = torch.full_like(timesteps, config.null_label, dtype=torch.int64)
            check_labels(config, labels, timesteps.shape)
            if config.label_embedding == "timestep":
                embedding = embedding + self.label_mlp(self._time_features(labels))
            else:
                embedding = embedding + self.label_embedding(labels)
        elif labels is not None:
            raise ValueError("this model is unconditional; labels must be None")
        parts = self.embedding_projection(activate(config.activation, embedding))
        if config.time_embedding == "fourier":
            parts = torch.cat([parts, timesteps[:, None].to(parts.dtype)], dim=1)
        return parts

    def _time_features(self, timesteps: torch.Tensor) -> torch.Tensor:
        """The features [B, config.time_features] of timesteps [B], or of labels embedded like them."""
        config, dtype = self.config, _dtype_of(self.time_mlp, torch.float32)
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        if config.time_embedding == "learned":
            return self.time_table(self._rows_of_table(timesteps))
        if config.time_embedding == "fourier":
            features = fourier_embedding(timesteps.to(precise), self.time_frequencies.to(precise))
        else:
            features = timestep_embedding(
                timesteps.to(precise) * config.timestep_scale,
                config.channels,
                flip_sin_to_cos=config.flip_sin_to_cos,
                freq_shift=config.freq_shift,
            )
        return features.to(dtype)

    def _rows_of_table(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Timesteps as rows of the learned table, int64 [B]; ValueError for others, if they can be read."""
        rows = timesteps.long()
        if readable(timesteps) and timesteps.device.type == "cpu" and timesteps.numel():
            last = self.time_table.num_embeddings - 1
            if not bool(((rows == timesteps) & (rows >= 0) & (rows <= last)).all()):
                low, high = timesteps.min(), timesteps.max()
                raise ValueError(
                    f"this model has learned the whole timesteps 0..{last} only, not {low:.6g}..{high:.6g}"
                )
        return rows

    def _checked_vectors(self, labels: torch.Tensor | None, embedding: torch.Tensor) -> torch.Tensor:
        """Labels as vectors that can be added to an embedding [B, E]; ValueError for other labels."""
        if not isinstance(labels, torch.Tensor) or labels.shape != embedding.shape:
            given = list(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise ValueError(
                f"labels must be vectors {list(embedding.shape)}, the embeddings of the images, not {given}"
            )
        return labels.to(embedding.dtype)

    def denoise(self, x: torch.Tensor, embedding: torch.Tensor, backend: str = "auto") -> torch.Tensor:
        """The network's output [B, out_channels, H, W] for x [B, in_channels, H, W] and `embed`'s [B, E].

        x is cast to the parameters' dtype, and the output has that dtype. backend: of the kernels. ValueError
        for a wrong shape, or a backend that cannot serve.
        """
        check_images(self.config, x)
        if embedding.shape != (x.shape[0], sum(self.embedding_sizes)):
            expected = [x.shape[0], sum(self.embedding_sizes)]
            raise ValueError(
                f"embedding must have shape {expected} for {len(x)} images, not {list(embedding.shape)}"
            )
        parts = iter(embedding.split(self.embedding_sizes, dim=1))  # one for each residual block
        x = x.to(_dtype_of(self.input_conv, x.dtype))
        if self.config.center_input:
            x = 2 * x - 1
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
        output = pixel_shuffle(output, self.config.patch_size)  # [B, out_channels, H, W]
        if self.config.time_embedding == "fourier":
            output = output / next(parts)[:, :, None, None]
        return output

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


def _mlp(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))


def _dtype_of(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """The dtype of the module's parameters; `otherwise` for a module without any."""
    parameter = next(module.parameters(), None)
    return otherwise if parameter is None else parameter.dtype
