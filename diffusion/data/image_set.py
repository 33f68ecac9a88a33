"""Images with their labels, as every reader of data sets gives them."""

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
