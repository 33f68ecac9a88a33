"""Images and labels to train on: their form, and whether they fit a network."""

import torch

from ..data.datasets import DatasetImages
from ..data.image_set import SomeImages
from ..models.config import UNetConfig
from ..storage.image_types import as_tensor
from ..utils.words import counted


def images_as_tensor(images: object) -> torch.Tensor:
    """A tensor or array of images as uint8 [N, C, H, W]; ValueError for images that are no bytes."""
    found = as_tensor(images)
    if found.dtype != torch.uint8:
        raise ValueError(
            f"images to train on must be uint8 in 0..255, not {str(found.dtype).removeprefix('torch.')}; "
            "make them so by (255 * x).round() from [0, 1], or ((x + 1) * 127.5).round() from [-1, 1]"
        )
    return found.unsqueeze(1) if found.ndim == 3 else found


def check_data(
    config: UNetConfig,
    images: torch.Tensor | SomeImages | DatasetImages,
    labels: torch.Tensor | None,
    batch_size: int,
    what: str = "images",
) -> None:
    """ValueError unless images and labels fit the network, and fill a batch. what: the images' name."""
    shape = (config.in_channels, *config.image_shape)
    if len(images.shape) != 4 or images.shape[1:] != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{what} must be [N, {wanted}] for this recipe, not {list(images.shape)}")
    if len(images) < batch_size:
        raise ValueError(f"{len(images)} {what} do not fill one batch of {batch_size}")
    if (labels is None) != (config.num_classes is None):
        raise ValueError(
            f"{what} have labels, but the model is unconditional"
            if config.num_classes is None
            else f"a class-conditional model needs labels, which the {what} do not have"
        )
    if labels is None or config.num_classes is None:
        return
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64 [{len(images)}], not {labels.dtype} {list(labels.shape)}")
    if not 0 <= labels.min() <= labels.max() < config.num_classes:
        raise ValueError(
            f"the labels of the {what} reach from {labels.min()} to {labels.max()}, but must be in "
            f"0..{config.num_classes - 1} for a model of {counted(config.num_classes, 'class')}"
        )
