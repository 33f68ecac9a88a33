"""LucidrainsConfig: the architecture of the UNet of lucidrains' denoising-diffusion-pytorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..utils.validation import choice, refuse
from .network import MAX_CHANNELS, NetworkConfig, check_halvings


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
        choice("attention_norm", self.attention_norm, ("rms", "layer"))
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
