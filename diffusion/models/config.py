"""UNetConfig: the architecture of a UNet, in numbers, checked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from ..utils.validation import choice, refuse
from .network import MAX_CHANNELS, MAX_PARAMETERS, NetworkConfig, check_halvings

RESAMPLING = ("conv", "resblock", "plain")
ACTIVATIONS = ("silu", "gelu", "mish", "relu")
TIME_EMBEDDINGS = ("sinusoidal", "fourier", "learned")
LABEL_EMBEDDINGS = ("table", "timestep", "identity")
MAX_LEVELS = 16

# The range of each numeric field; the fields not listed have 1..MAX_CHANNELS.
_BOUNDS: dict[str, dict[str, float]] = {
    "channels": {"least": 4, "most": MAX_CHANNELS},
    "channel_mult": {"above": 0, "most": 1024},
    "num_res_blocks": {"least": 1, "most": 64},
    "attention_levels": {"least": 0, "most": MAX_LEVELS - 1},
    "mid_attention_groups": {"least": 0, "most": MAX_CHANNELS},
    "patch_size": {"least": 1, "most": 64},
    "freq_shift": {"least": 0, "most": MAX_CHANNELS},
    "timestep_scale": {"above": 0, "most": 1000},
    "norm_eps": {"least": 1e-12, "below": 1},
    "dropout": {"least": 0, "below": 1},
    "num_classes": {"least": 1, "most": 2**31 - 1},
    "up_attention_levels": {"least": 0, "most": MAX_LEVELS - 1},
    "mid_divisor": {"above": 0, "most": 1024},
    "learned_timesteps": {"least": 1, "most": 1_000_000},
}


@dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """The architecture of a UNet. The defaults are DDPM's for 32x32 images (Ho et al. 2020, appendix B).

    Level i works on feature maps with sides of sample_size / patch_size / 2**i and channels * channel_mult[i]
    channels. The resolution changes once between each level and the next.

    sample_size: height and width of the images, or one integer for both; divisible by patch_size *
        2**(levels - 1).
    patch_size: side, in pixels, of the square patches that are one position of the network: PixelUnshuffle
        before the first convolution and PixelShuffle after the last (Shi et al. 2016, arXiv 1609.05158); 1
        for none.
    in_channels, out_channels: channels of the images and of the output; out_channels = 2 * in_channels
        means a learned variance (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1).
    channels, channel_mult: the base width, and its multiple at each level.
    input_width: width of the first convolution; None for that of level 0.
    num_res_blocks: number of residual blocks at each level on the way down, or one integer for all levels;
        the way up has one more.
    attention_levels: levels with attention after each block. For 32x32 images, level 1 is DDPM's attention at
        16x16; guided diffusion's attention at downsampling factor 4 is level 2.
    mid_attention: attention between the two middle blocks.
    mid_attention_groups: groups of its normalisation; None for norm_groups, 0 for no normalisation.
    num_heads, head_channels: number of attention heads, or, if head_channels is given, the width of each.
    time_embed_dim: width of the time embedding, 4 * channels by default.
    scale_shift: the embedding scales and shifts the second normalisation of each block (adaptive group norm,
        Dhariwal & Nichol 2021, arXiv 2105.05233, section 3.1), instead of being added before it.
    flip_sin_to_cos, freq_shift: the sinusoidal embedding has its cosines first, and frequencies
        10000 ** (-i / (channels / 2 - freq_shift)): False and 1 in DDPM, True and 0 in guided diffusion.
    timestep_scale: factor of the timesteps before the embedding; 0.25 for improved DDPM's 4000 timesteps.
    downsample, upsample: "conv" (3x3, with stride 2 or after nearest-neighbour), "resblock" (inside one more
        residual block, Song et al. 2021, arXiv 2011.13456, appendix H) or "plain" (average pooling,
        nearest-neighbour); or one of them for each change of resolution, from the finest on.
    downsample_padding: padding of the strided convolution: "asymmetric" (right and bottom, as in DDPM) or
        "symmetric" (as in guided diffusion).
    norm_groups, norm_eps: groups and epsilon of every group normalisation.
    dropout: probability in every residual block.
    num_classes: number K of classes, or None for an unconditional model.
    has_null_label: row K of the label embedding stands for no label (Ho & Salimans 2022, arXiv 2207.12598).
    up_attention_levels: levels with attention on the way up; None for attention_levels.
    activation: of the residual blocks, "silu", "gelu" (with the error function), "mish" or "relu"; SiLU
        stays that of the time embedding and of the last normalisation.
    has_middle: residual blocks and attention at the coarsest resolution, between the way down and the way up.
    mid_divisor: the sums of the middle's residual connections are divided by it.
    center_input: the network is given images in [0, 1], and maps them to [-1, 1] itself.
    time_embedding: "sinusoidal"; "fourier", random frequencies of the timestep's logarithm, for which the
        output is divided by the timestep (Song et al. 2021, arXiv 2011.13456, appendix H); or "learned", a
        row of a table for each whole timestep.
    learned_timesteps: rows of the learned table, None for the other embeddings.
    label_embedding: "table", a row for each label; "timestep", the label is embedded as a timestep is, by
        an MLP of its own, and has no null label; or "identity", each label is itself an embedding [E], and
        num_classes is None.
    narrow_attention: where head_channels does not divide the channels of a level, its attention has the
        largest multiple of head_channels; without it, such numbers are refused.

    ValueError for a value of a wrong type or out of range, or more than 2**34 parameters.
    """

    sample_size: int | tuple[int, int] = 32
    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    channel_mult: tuple[int | float, ...] = (1, 2, 2, 2)
    num_res_blocks: int | tuple[int, ...] = 2
    attention_levels: tuple[int, ...] = (1,)
    mid_attention: bool = True
    mid_attention_groups: int | None = None
    num_heads: int = 1
    head_channels: int | None = None
    time_embed_dim: int | None = None
    scale_shift: bool = False
    flip_sin_to_cos: bool = False
    freq_shift: int | float = 1
    timestep_scale: int | float = 1
    downsample: str | tuple[str, ...] = "conv"
    upsample: str | tuple[str, ...] = "conv"
    downsample_padding: str = "asymmetric"
    norm_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.0
    num_classes: int | None = None
    has_null_label: bool = True
    patch_size: int = 1
    up_attention_levels: tuple[int, ...] | None = None
    activation: str = "silu"
    has_middle: bool = True
    mid_divisor: int | float = 1
    center_input: bool = False
    time_embedding: str = "sinusoidal"
    learned_timesteps: int | None = None
    label_embedding: str = "table"
    input_width: int | None = None
    narrow_attention: bool = False
    bounds: ClassVar[dict[str, dict[str, float]]] = _BOUNDS

    def __post_init__(self) -> None:
        super().__post_init__()
        levels, blocks = len(self.channel_mult), self.level_blocks
        if self.channels % 2:
            refuse("channels", "even", self.channels)
        if not 1 <= levels <= MAX_LEVELS:
            refuse("channel_mult", f"a number for each of 1..{MAX_LEVELS} levels", list(self.channel_mult))
        if min(self.level_channels) < 1:
            refuse("channel_mult", "large enough for a channel", list(self.channel_mult))
        if len(blocks) != levels:
            refuse("num_res_blocks", f"a whole number, or {levels} such numbers", list(blocks))
        for name in ("attention_levels", "up_attention_levels"):
            if not all(level < levels for level in getattr(self, name) or ()):
                refuse(name, f"in 0..{levels - 1}", list(getattr(self, name)))
        if self.freq_shift >= self.channels / 2:
            refuse("freq_shift", f"less than half of {self.channels} channels", self.freq_shift)
        for name in ("downsample", "upsample"):
            kinds = self._per_change(getattr(self, name))
            for kind in kinds:
                choice(f"kind of {name}", kind, RESAMPLING)
            if len(kinds) != levels - 1:
                refuse(name, f"a name, or {levels - 1} of them", list(kinds))
        choice("downsample_padding", self.downsample_padding, ("asymmetric", "symmetric"))
        choice("activation", self.activation, ACTIVATIONS)
        choice("time_embedding", self.time_embedding, TIME_EMBEDDINGS)
        choice("label_embedding", self.label_embedding, LABEL_EMBEDDINGS)
        if (self.learned_timesteps is None) != (self.time_embedding != "learned"):
            expected = "a number of rows" if self.time_embedding == "learned" else "None"
            name = f"{expected} for the time_embedding {self.time_embedding!r}"
            refuse("learned_timesteps", name, self.learned_timesteps)
        if self.label_embedding == "timestep" and (self.num_classes is None or self.has_null_label):
            raise ValueError("label_embedding 'timestep' needs num_classes, and has no null label")
        if self.label_embedding == "identity" and self.num_classes is not None:
            refuse("num_classes", "None for the label_embedding 'identity'", self.num_classes)
        self.check_size(self.image_shape)
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"a UNet of this configuration has {self.num_parameters:,} parameters, "
                f"more than {MAX_PARAMETERS:,}"
            )

    def _per_change(self, kinds: str | tuple[str, ...]) -> tuple[str, ...]:
        return (kinds,) * (len(self.channel_mult) - 1) if isinstance(kinds, str) else kinds

    def check_size(self, size: Sequence[int]) -> None:
        """ValueError unless images of this height and width can be halved between all levels."""
        check_halvings(size, len(self.channel_mult) - 1, self.patch_size)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(self.channels * mult) for mult in self.channel_mult)

    @property
    def level_attention(self) -> tuple[tuple[bool, bool], ...]:
        """Whether the blocks of each level have attention, on the way down and on the way up."""
        up = self.attention_levels if self.up_attention_levels is None else self.up_attention_levels
        return tuple((i in self.attention_levels, i in up) for i in range(len(self.channel_mult)))

    @property
    def embed_dim(self) -> int:
        """Width of the time embedding."""
        return self.time_embed_dim or 4 * self.channels

    @property
    def label_size(self) -> int | None:
        """Size of the vectors that are the labels of images; None where labels are whole numbers."""
        return self.embed_dim if self.label_embedding == "identity" else None

    @property
    def time_features(self) -> int:
        """Features of a timestep before the MLP of the time embedding."""
        return self.channels * (2 if self.time_embedding == "fourier" else 1)

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """Residual blocks of each level on the way down."""
        n = self.num_res_blocks
        return (n,) * len(self.channel_mult) if isinstance(n, int) else n

    @property
    def level_downsample(self) -> tuple[str | None, ...]:
        """Downsampling after each level; None for the coarsest."""
        return (*self._per_change(self.downsample), None)

    @property
    def level_upsample(self) -> tuple[str | None, ...]:
        """Upsampling after each level; None for the finest."""
        return (None, *self._per_change(self.upsample))

    def feature_maps(self) -> tuple[int, int]:
        """Numbers in all feature maps of one image that are held at a time, and in the largest; estimates."""
        numbers, positions = 0, [side // self.patch_size for side in self.image_shape]
        for i, (width, blocks) in enumerate(zip(self.level_channels, self.level_blocks, strict=True)):
            pixels = math.prod(side >> i for side in positions)
            numbers += pixels * width * (4 * blocks + 12)  # encoder, wider decoder, and the rest
        return numbers, math.prod(positions) * self.level_channels[0]

    @cached_property
    def num_parameters(self) -> int:
        """Number of parameters of such a UNet, computed without building it."""
        embed, widths = self.embed_dim, self.level_channels

        def residual(inputs: int, outputs: int) -> int:
            convolutions = 9 * inputs * outputs + outputs + 9 * outputs * outputs + outputs
            skip = inputs * outputs + outputs if inputs != outputs else 0
            modulation = outputs * (2 if self.scale_shift else 1)
            return 2 * inputs + 2 * outputs + convolutions + skip + modulation * (embed + 1)

        def attention(width: int, norm: bool = True) -> int:
            head = self.head_channels if self.narrow_attention and self.head_channels else 1
            inner = width // head * head
            return 3 * inner * (width + 1) + width * (inner + 1) + 2 * width * norm

        def resampling(kind: str | None, width: int) -> int:
            if kind == "resblock":
                return residual(width, width)
            return 9 * width * width + width if kind == "conv" else 0

        mlp = (self.time_features + 1) * embed + (embed + 1) * embed
        count = mlp + self.channels * ((self.learned_timesteps or 0) + (self.time_embedding == "fourier"))
        if self.label_embedding == "timestep":
            count += mlp
        elif self.num_classes is not None:
            count += (self.num_classes + self.has_null_label) * embed
        width = self.input_width or widths[0]
        count += (9 * self.patch_size**2 * self.in_channels + 1) * width
        skips = [width]
        levels = list(zip(widths, self.level_blocks, self.level_downsample, self.level_upsample, strict=True))
        for level, (outputs, blocks, down, _) in enumerate(levels):
            count += blocks * attention(outputs) * self.level_attention[level][0]
            for _ in range(blocks):
                count += residual(width, outputs)
                width = outputs
            skips += [width] * (blocks + (down is not None))
            count += resampling(down, width)
        middle = 2 * residual(width, width)
        middle += attention(width, self.mid_attention_groups != 0) * self.mid_attention
        count += middle * self.has_middle
        for level, (outputs, blocks, _, up) in reversed(list(enumerate(levels))):
            count += (blocks + 1) * attention(outputs) * self.level_attention[level][1]
            for _ in range(blocks + 1):
                count += residual(width + skips.pop(), outputs)
                width = outputs
            count += resampling(up, width)
        return count + 2 * width + (9 * width + 1) * self.patch_size**2 * self.out_channels
