"""The network of the classifier."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..data import to_float
from ..validation import whole_number

MOST_PARAMETERS = 2**28  # 1 GiB in float32; the bundled classifiers have less than a million


@dataclass(frozen=True)
class ClassifierConfig:
    """Square images of `channels` channels and `size` pixels a side, at least 12, of `classes` classes.

    width: channels of the first convolutions. features: of the penultimate layer. The defaults are those of
    the digit classifier that comes with the package.
    """

    channels: int = 1
    size: int = 28
    classes: int = 10
    width: int = 16
    features: int = 64

    def __post_init__(self) -> None:
        least = {"channels": 1, "size": 12, "classes": 2, "width": 1, "features": 1}
        for name, value in asdict(self).items():
            value = whole_number(f"a classifier's {name}", value, least[name], 65536)
            object.__setattr__(self, name, value)
        if self.num_parameters > MOST_PARAMETERS:
            raise ValueError(
                f"such a classifier has {self.num_parameters:,} parameters, more than {MOST_PARAMETERS:,}"
            )

    @property
    def num_hidden(self) -> int:
        """Numbers of an image that the layer of features sees."""
        return 4 * self.width * ((self.size - 4) // 4) ** 2

    @property
    def num_parameters(self) -> int:
        """How many numbers the weights of such a classifier are, without building it."""
        width = self.width
        convolutions = 9 * width * (self.channels + 15 * width) + 20 * width
        hidden = (self.num_hidden + 1) * self.features
        return convolutions + hidden + (self.features + 1) * self.classes


class Classifier(nn.Module):
    """Convolutional network: five 3x3 convolutions, a layer of features, logits.

    `folder` is where `load_classifier` found its weights.
    """

    def __init__(self, config: ClassifierConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ClassifierConfig()
        width = config.width
        self.convolutions = nn.Sequential(
            *_block(config.channels, width, padding=0),
            *_block(width, width, padding=0),
            nn.MaxPool2d(2),
            *_block(width, 2 * width, padding=1),
            *_block(2 * width, 2 * width, padding=1),
            nn.MaxPool2d(2),
            *_block(2 * width, 4 * width, padding=1),
        )
        self.hidden = nn.Linear(config.num_hidden, config.features)
        self.dropout = nn.Dropout(0.3)
        self.output = nn.Linear(config.features, config.classes)
        self.folder: Path | None = None

    @property
    def num_features(self) -> int:
        """Of the penultimate layer."""
        return self.config.features

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image, [C, H, W]."""
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


def _block(in_channels: int, out_channels: int, padding: int) -> list[nn.Module]:
    convolution = nn.Conv2d(in_channels, out_channels, 3, padding=padding, bias=False)
    return [convolution, nn.BatchNorm2d(out_channels), nn.ReLU()]


@torch.inference_mode()
def classify(classifier: Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features float32 [N, F] and predicted classes int64 [N] of images uint8 [N, C, H, W]."""
    features = torch.cat([classifier.features(to_float(part)) for part in images.split(500)])
    return features, classifier.output(features).argmax(1)
