"""The interface of a model's network, and of the configuration that describes it."""

import functools
import math
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from torch import nn

from ..utils.validation import known_names, typed

MAX_CHANNELS = 65536
MAX_PARAMETERS = 2**34  # 64 GiB in float32; the largest published UNets of pixels have 2 billion
C = TypeVar("C", bound="NetworkConfig")


@dataclass(frozen=True)
class NetworkConfig:
    """The architecture of a network, in numbers, checked.

    A subclass is a frozen dataclass. Its fields are checked by their types and by `bounds`, and JSON holds
    them by name. These must be among its fields or properties:

    sample_size: height and width of the images, or one integer for both.
    in_channels, out_channels: channels of the images and of the output; out_channels = 2 * in_channels means
        a learned variance (Nichol & Dhariwal 2021, arXiv 2102.09672, section 3.1).
    num_classes: number K of classes, or None for an unconditional model.
    has_null_label: the label K stands for no label (Ho & Salimans 2022, arXiv 2207.12598).

    ValueError for a value of a wrong type or out of range.
    """

    if typing.TYPE_CHECKING:

        @property
        def sample_size(self) -> int | tuple[int, int]: ...
        @property
        def in_channels(self) -> int: ...
        @property
        def out_channels(self) -> int: ...
        @property
        def num_classes(self) -> int | None: ...
        @property
        def has_null_label(self) -> bool: ...

    # The range of a numeric field, as `validation.typed` takes it; fields not listed have 1..MAX_CHANNELS.
    bounds: ClassVar[dict[str, dict[str, float]]] = {}

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in fields(self):
            bounds = self.bounds.get(field.name, {"least": 1, "most": MAX_CHANNELS})
            value = typed(field.name, getattr(self, field.name), hints[field.name], **bounds)
            object.__setattr__(self, field.name, value)

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of the images."""
        return (self.sample_size, self.sample_size) if isinstance(self.sample_size, int) else self.sample_size

    @property
    def learned_variance(self) -> bool:
        """Whether half of the output channels are the variance of improved DDPM."""
        return self.out_channels == 2 * self.in_channels

    @property
    def self_condition(self) -> bool:
        """Whether the network also takes the x_0 that was predicted in the step before, as `x0_prev`."""
        return False

    @property
    def null_label(self) -> int | None:
        """The label that stands for no label; None for a model that has none."""
        return self.num_classes if self.has_null_label else None

    @property
    def label_size(self) -> int | None:
        """Size of the vectors that are the labels of images; None where labels are whole numbers."""
        return None

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of parameters of such a network."""
        from .registry import build_on_meta

        return sum(parameter.numel() for parameter in build_on_meta(self).parameters())

    def feature_maps(self) -> tuple[int, int]:
        """Numbers in all feature maps of one image that are held at a time, and in the largest; estimates."""
        width = 128  # a usual number of channels at the full resolution
        largest = width * math.prod(self.image_shape)
        return 32 * largest, largest

    def check_size(self, size: Sequence[int]) -> None:
        """ValueError unless the network takes images of this height and width."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls: type[C], values: dict) -> C:
        """The inverse of `to_dict`; fields left out have their defaults. ValueError for unknown fields."""
        name = cls.__name__.removesuffix("Config")
        typed(f"a {name}'s configuration", values, dict)
        known_names(f"{name} option", values, [field.name for field in fields(cls)])
        return cls(**values)


def check_halvings(size: Sequence[int], halvings: int, unit: int = 1, units: str = "patches") -> None:
    """ValueError unless images of this height and width can be halved so often into whole squares.

    unit: side of the squares, in pixels after the last halving. units: their name in the message.
    """
    multiple = unit * 2**halvings
    if any(side < 1 or side % multiple for side in size):
        divided = f" in {units} of {unit}x{unit}" if unit > 1 else ""
        raise ValueError(
            f"images of {size[0]}x{size[1]}{divided} cannot be halved {halvings} times; "
            f"height and width must be multiples of {multiple}"
        )


class Network(nn.Module):
    """A network that predicts from noisy images: `forward(x, timesteps, labels=None, backend="auto")`.

    x: [B, in_channels, H, W]. timesteps: [B], integer or floating point, as the schedule counts them. labels:
    int64 [B] in 0..K-1, or K for no label; None for no label in the whole batch, and always for an
    unconditional network. backend: of the package's kernels. It returns [B, out_channels, H, W].

    A subclass names the class of its configuration, `Config`, takes one in its constructor and keeps it as
    `config`. `registry.NETWORKS` lists the subclasses.
    """

    Config: ClassVar[type[NetworkConfig]]
    config: NetworkConfig
