"""Images with their labels, as every reader of data sets gives them."""

import hashlib
import statistics
from typing import NamedTuple

import torch


class ImageSet(NamedTuple):
    """Images with their labels.

    images: uint8 [N, C, H, W]. labels: int64 [N], or None. classes: the names of the labels 0, 1 and so on,
    or None where they have no names. name: the data set's, for messages.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    classes: tuple[str, ...] | None
    name: str

    def known_labels(self) -> torch.Tensor:
        """The labels. ValueError if there are none."""
        if self.labels is None:
            raise ValueError(f"{self.name} has no labels; put its images into a folder for each class")
        return self.labels


class Survey(NamedTuple):
    """The contents of a data set, as far as they are known before its images are decoded.

    images: their number. channels: 1 if all images are grey, otherwise 3. size: height and width if all
    images have the same, otherwise None. side: the median of their shorter sides, in pixels. labelled: they
    have labels. classes: number of their classes; None if it is not known yet. class_names: their names, or
    None.
    """

    images: int
    channels: int
    size: tuple[int, int] | None
    side: int
    labelled: bool
    classes: int | None = None
    class_names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, images: int, channels: int, sizes: list[tuple[int, int]], labelled: bool) -> "Survey":
        """The survey of so many images, of which some have these heights and widths."""
        same = sizes[0] if len(set(sizes)) == 1 else None
        return cls(images, channels, same, int(statistics.median(min(size) for size in sizes)), labelled)


class SomeImages:
    """Some of the images of a tensor, copied only as they are asked for: the tensor may be a mapped file.

    images: uint8 [N, C, H, W]. indices: int64 [M], of the images that are meant.
    """

    dtype = torch.uint8

    def __init__(self, images: torch.Tensor, indices: torch.Tensor):
        self.images, self.indices = images, indices
        self.shape = torch.Size((len(indices), *images.shape[1:]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        """The images uint8 [B, C, H, W] at these positions, int64 [B], among the indices."""
        return self.images[self.indices[index]]

    def digest(self) -> bytes:
        """SHA-256 of all images of the tensor, and of the indices."""
        digest = hashlib.sha256(self.images.contiguous().numpy().data)
        digest.update(self.indices.numpy().data)
        return digest.digest()
