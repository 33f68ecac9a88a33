"""UNetConfig: the architecture of a UNet, in numbers, checked."""

import math
import types
import typing
from dataclasses import asdict, dataclass, fields

RESAMPLING = ("conv", "resblock", "plain")


@dataclass(frozen=True)
class UNetConfig:
    """The architecture of a UNet. The defaults are DDPM's for 32x32 images (Ho et al. 2020, appendix B).

    Level i of the network works on feature maps of sample_size / 2**i and channels * channel_mult[i]
    channels, and there is one change of resolution between each level and the next.

    sample_size: height and width of the images, or one integer for both; divisible by 2**(levels - 1).
    in_channels, out_channels: of the images and of the output; out_channels = 2 * in_channels means a
        learned variance (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1).
    channels, channel_mult: the base width, and its multiple at each level.
    num_res_blocks: on the way down, at each level, or one integer for all; one more on the way up.
    attention_levels: the levels whose blocks are followed by attention: for 32x32 images, 1 is DDPM's
        attention at 16x16, and guided diffusion's attention at downsampling factor 4 is level 2.
    mid_attention: attention between the two blocks in the middle. mid_attention_groups: of its
        normalisation; None for norm_groups, 0 for no normalisation.
    num_heads, head_channels: attention heads, or, where head_channels is given, the width of each.
    time_embed_dim: width of the time embedding, 4 * channels by default.
    scale_shift: the embedding scales and shifts the second normalisation of each block (adaptive group norm,
        Dhariwal & Nichol 2021, arXiv 2105.05233, section 3.1), instead of being added before it.
    flip_sin_to_cos, freq_shift: the sinusoidal embedding has its cosines first, and frequencies
        10000 ** (-i / (channels / 2 - freq_shift)): False and 1 in DDPM, True and 0 in guided diffusion.
    timestep_scale: the timesteps are multiplied by it first; improved DDPM's models of 4000 steps take 0.25.
    downsample, upsample: "conv" (3x3, with stride 2 or after nearest-neighbour), "resblock" (inside one more
        residual block, Song et al. 2021, arXiv 2011.13456, appendix H) or "plain" (average pooling,
        nearest-neighbour); or one of them for each change of resolution, from the finest on.
    downsample_padding: of the strided convolution: "asymmetric" (right and bottom, as in DDPM) or
        "symmetric" (as in guided diffusion).
    norm_groups, norm_eps: of every group normalisation. dropout: in every residual block.
    num_classes: K, or None for an unconditional model. has_null_label: row K of the label embedding stands
        for no label (Ho & Salimans 2022, arXiv 2207.12598).

    ValueError: a value of a wrong type or out of range.
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

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, list):
                value = tuple(value)
                object.__setattr__(self, name, value)
            if not _matches(value, hint):
                expected = hint.__name__ if isinstance(hint, type) else str(hint)
                raise ValueError(f"{name} must be {expected}, not {value!r}")
        for name in ("in_channels", "out_channels", "num_heads", "norm_groups"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("head_channels", "time_embed_dim", "num_classes"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        _require(self.channels >= 4 and self.channels % 2 == 0, "channels", "even, at least 4", self.channels)
        _require(len(self.channel_mult) >= 1, "channel_mult", "one number for each level", self.channel_mult)
        _require(min(self.level_channels) >= 1, "channel_mult", "positive", self.channel_mult)
        levels = len(self.channel_mult)
        blocks = self.level_blocks
        _require(
            len(blocks) == levels and min(blocks) >= 1,
            "num_res_blocks",
            f"at least 1, or {levels} such numbers",
            self.num_res_blocks,
        )
        _require(
            all(0 <= level < levels for level in self.attention_levels),
            "attention_levels",
            f"in 0..{levels - 1}",
            self.attention_levels,
        )
        groups = self.mid_attention_groups
        _require(groups is None or groups >= 0, "mid_attention_groups", "0 or more", groups)
        _require(0 <= self.freq_shift < self.channels / 2, "freq_shift", "0 or more", self.freq_shift)
        _require(self.timestep_scale > 0, "timestep_scale", "positive", self.timestep_scale)
        for name in ("downsample", "upsample"):
            kinds = self._per_change(getattr(self, name))
            _require(
                len(kinds) == levels - 1 and set(kinds) <= set(RESAMPLING),
                name,
                f"one of {', '.join(RESAMPLING)}, or {levels - 1} of them",
                getattr(self, name),
            )
        _require(
            self.downsample_padding in ("asymmetric", "symmetric"),
            "downsample_padding",
            "'asymmetric' or 'symmetric'",
            self.downsample_padding,
        )
        _require(0 < self.norm_eps < 1, "norm_eps", "in (0, 1)", self.norm_eps)
        _require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        self.check_size(self.image_shape)

    def _per_change(self, kinds: str | tuple[str, ...]) -> tuple[str, ...]:
        return (kinds,) * (len(self.channel_mult) - 1) if isinstance(kinds, str) else kinds

    def check_size(self, size: tuple[int, int]) -> None:
        """ValueError unless images of this height and width can be halved between all levels."""
        halvings = len(self.channel_mult) - 1
        if any(side < 1 or side % 2**halvings for side in size):
            raise ValueError(
                f"images of {size[0]}x{size[1]} cannot be halved {halvings} times; "
                f"height and width must be multiples of {2**halvings}"
            )

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(self.channels * mult) for mult in self.channel_mult)

    @property
    def level_blocks(self) -> tuple[int, ...]:
        """Residual blocks of each level on the way down."""
        n = self.num_res_blocks
        return (n,) * len(self.channel_mult) if isinstance(n, int) else n

    @property
    def level_downsample(self) -> tuple[str | None, ...]:
        """How each level is left on the way down; None for the coarsest."""
        return (*self._per_change(self.downsample), None)

    @property
    def level_upsample(self) -> tuple[str | None, ...]:
        """How each level is left on the way up; None for the finest."""
        return (None, *self._per_change(self.upsample))

    @property
    def learned_variance(self) -> bool:
        """Whether half of the output channels are the variance of improved DDPM."""
        return self.out_channels == 2 * self.in_channels

    @property
    def null_label(self) -> int | None:
        """The label that stands for no label; None for a model that has none."""
        return self.num_classes if self.has_null_label else None

    def to_dict(self) -> dict:
        """All fields, as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict) -> "UNetConfig":
        """The inverse of `to_dict`; fields left out have their defaults. ValueError for unknown fields."""
        if not isinstance(values, dict):
            raise ValueError(f"a UNet's configuration must be a dictionary, not {type(values).__name__}")
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown UNet option {unknown[0]!r}; choose from: {', '.join(known)}")
        return cls(**values)


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, not {value!r}")


def _matches(value: object, hint: object) -> bool:
    """Whether a value is of an annotated type: bool is no number, int is float, float is finite."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_matches(value, option) for option in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        items = args[:1] * len(value) if args[-1] is ... else args
        return len(items) == len(value) and all(map(_matches, value, items))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
