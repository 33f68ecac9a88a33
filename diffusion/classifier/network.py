"""The networks of the classifier."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..kernels import conv2d
from ..storage.images import to_float
from ..utils.validation import choice, refuse, whole_number

ARCHITECTURES = ("plain", "residual")
MAX_PARAMETERS = 2**28  # 1 GiB in float32; the classifiers of the package have about a million


@dataclass(frozen=True)
class ClassifierConfig:
    """The architecture of a classifier. The defaults are those of the package's classifier of digits.

    channels, size: channels and side of the square images; size is at least 12 pixels.
    classes: number of classes, at least 2.
    width: channels of the first convolutions. features: size of the penultimate layer, a multiple of 4 for a
    residual network. architecture: "plain" or "residual", see `Classifier`. ValueError for other values, or
    more than 2**28 parameters.
    """

    channels: int = 1
    size: int = 28
    classes: int = 10
    width: int = 16
    features: int = 64
    architecture: str = "plain"

    def __post_init__(self) -> None:
        choice("architecture", self.architecture, ARCHITECTURES)
        least = {"channels": 1, "size": 12, "classes": 2, "width": 1, "features": 1}
        for name in least:
            value = whole_number(f"a classifier's {name}", getattr(self, name), least[name], 65536)
            object.__setattr__(self, name, value)
        if self.architecture == "residual" and self.features % 4:
            refuse("a residual classifier's features", "a multiple of 4", self.features)
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"such a classifier has {self.num_parameters:,} parameters, more than {MAX_PARAMETERS:,}"
            )

    @property
    def num_hidden(self) -> int:
        """Inputs of the linear layer that makes the features of a plain network."""
        return 4 * self.width * ((self.size - 4) // 4) ** 2

    @property
    def stages(self) -> tuple[int, ...]:
        """Channels of the three stages of a residual network."""
        return self.features // 4, self.features // 2, self.features

    @property
    def num_parameters(self) -> int:
        """Number of weights of such a classifier, computed without building it."""
        width = self.width
        if self.architecture == "plain":
            convolutions = 9 * width * (self.channels + 15 * width) + 20 * width
            hidden = (self.num_hidden + 1) * self.features
        else:
            hidden, convolutions, channels = 0, (9 * self.channels + 2) * width, width
            for stage in self.stages:
                convolutions += 9 * stage * (channels + stage) + 4 * stage
                channels = stage
        return convolutions + hidden + (self.features + 1) * self.classes


class Classifier(nn.Module):
    """A convolutional network with a penultimate layer of non-negative features, and logits.

    "plain": five 3x3 convolutions and a linear layer, which suit digits. "residual": a 3x3 convolution and
    three stages, each of a 3x3 convolution with stride 2 and a residual block; the features are the means
    over the pixels of the last stage. Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) and ReLU
    follow each convolution.

    `folder` is the folder from which `load_classifier` read the weights; other classifiers lack it.
    """

    folder: Path
    hidden: nn.Module

    def __init__(self, config: ClassifierConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ClassifierConfig()
        if config.architecture == "plain":
            self.convolutions, self.hidden = _plain(config)
            self.dropout = nn.Dropout(0.3)
        else:
            self.convolutions, self.hidden = _residual(config), nn.Identity()
            self.dropout = nn.Dropout(0.0)
        self.output = nn.Linear(config.features, config.classes)

    @property
    def num_features(self) -> int:
        """Size of the penultimate layer."""
        return self.config.features

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape [C, H, W] of an image."""
        return self.config.channels, self.config.size, self.config.size

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Penultimate layer after its ReLU, [N, F], of images float32 [N, C, H, W] in [-1, 1]."""
        if x.ndim != 4 or x.shape[1:] != self.shape:
            raise ValueError(f"this classifier takes images {['N', *self.shape]}, not {list(x.shape)}")
        x = x.contiguous(memory_format=torch.channels_last)
        return F.relu(self.hidden(self.convolutions(x).flatten(1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [N, K] of images float32 [N, C, H, W] in [-1, 1]."""
        return self.output(self.dropout(self.features(x)))


def _plain(config: ClassifierConfig) -> tuple[nn.Sequential, nn.Linear]:
    width = config.width
    convolutions = nn.Sequential(
        *_block(config.channels, width, padding=0),
        *_block(width, width, padding=0),
        nn.MaxPool2d(2),
        *_block(width, 2 * width, padding=1),
        *_block(2 * width, 2 * width, padding=1),
        nn.MaxPool2d(2),
        *_block(2 * width, 4 * width, padding=1),
    )
    return convolutions, nn.Linear(config.num_hidden, config.features)


def _residual(config: ClassifierConfig) -> nn.Sequential:
    layers = _block(config.channels, config.width, padding=1)
    channels = config.width
    for out_channels in config.stages:
        layers += [*_block(channels, out_channels, padding=1, stride=2), _Residual(out_channels)]
        channels = out_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))


class _Residual(nn.Module):
    """x + relu(norm(convolution(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*_block(channels, channels, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class _Convolution(nn.Conv2d):
    """Computed by `kernels.conv2d`, whose weight gradient is faster than PyTorch's on processors with AMX."""

    padding: tuple[int, ...]  # never one of PyTorch's names of paddings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return conv2d(x, self.weight, self.bias, stride=self.stride[0], padding=self.padding[0])


def _block(in_channels: int, out_channels: int, padding: int, stride: int = 1) -> list[nn.Module]:
    convolution = _Convolution(in_channels, out_channels, 3, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


@torch.inference_mode()
def classify(classifier: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features float32 [N, F] and predicted classes int64 [N] of images uint8 [N, C, H, W]."""
    features = torch.cat([classifier.features(to_float(part)) for part in images.split(500)])
    return features, classifier.output(features).argmax(1)
