"""The images and labels in the items of a data set, and the labels and class names that it holds apart."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..utils.errors import one_line
from ..utils.validation import shown

IMAGE_KEYS = ("image", "img", "images", "pixel_values")
LABEL_KEYS = ("label", "labels", "fine_label", "target", "class")
Label = int | str | None  # a class by number or name; None for no label
MAX_LABEL = 2**31 - 1


def item(dataset: Any, number: int) -> tuple[Any, Label]:
    """The image and the label of an item. ValueError, with the item's number, if it cannot be read."""
    try:
        found = dataset[number]
    except MemoryError:
        raise
    except Exception as error:  # a data set runs its user's code
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"item {number} of the data set cannot be read: {reason}") from error
    if isinstance(found, dict):
        image = next((key for key in IMAGE_KEYS if key in found), None)
        key = next((key for key in LABEL_KEYS if key in found), None)
        if image is None:
            keys = ", ".join(map(str, found))
            raise ValueError(f"the items of the data set have no image: {keys}; rename its column to 'image'")
        return found[image], _label(None if key is None else found[key], number)
    if isinstance(found, tuple | list):
        return found[0], _label(found[1] if len(found) > 1 else None, number)
    return found, None


def _label(value: Any, number: int) -> Label:
    """The label of an item, checked. -1 is no label, as in data sets of Hugging Face."""
    single = isinstance(value, torch.Tensor | np.ndarray | np.generic) and np.prod(value.shape) == 1
    found = value.item() if single else value
    if found is None or isinstance(found, str):
        return found
    if not isinstance(found, int) or not -1 <= found <= MAX_LABEL:
        raise ValueError(
            f"the label of item {number} of the data set must be a whole number from 0 on, or a name, not "
            f"{shown(value)}; a set of the images alone trains without labels"
        )
    return None if found == -1 else int(found)


def known_labels(dataset: Any) -> list[Label] | None:
    """The labels [N] that a data set holds apart from its items; None for others."""
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        name = next((key for key in LABEL_KEYS if key in columns), None)
        return None if name is None else [_label(value, k) for k, value in enumerate(dataset[name][:])]
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # torch.utils.data.Subset
        whole = known_labels(dataset.dataset)
        return None if whole is None else [whole[int(index)] for index in dataset.indices]
    found = getattr(dataset, "targets", None)
    if found is None or not hasattr(found, "__len__") or len(found) != len(dataset):
        return None
    try:
        values = found.tolist() if isinstance(found, torch.Tensor | np.ndarray) else found
        return [_label(value, k) for k, value in enumerate(values)]
    except ValueError:  # such as boxes, of which the items may make labels
        return None


def changes_labels(dataset: Any) -> bool:
    """Whether a data set of torchvision, or the one below a `Subset`, has a target_transform."""
    while dataset is not None:
        if getattr(dataset, "target_transform", None) is not None:
            return True
        dataset = getattr(dataset, "dataset", None)
    return False


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """The names of the classes that a data set gives, or None."""
    while hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # torch.utils.data.Subset
        dataset = dataset.dataset
    features = getattr(dataset, "features", None)
    if isinstance(features, dict):
        name = next((key for key in LABEL_KEYS if key in features), None)
        names = None if name is None else getattr(features[name], "names", None)
    else:
        names = getattr(dataset, "classes", None)
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def unused_columns(dataset: Any) -> list[str]:
    """The columns of a data set of which neither images nor labels are taken."""
    columns = getattr(dataset, "column_names", None)
    if columns is None:
        first = dataset[0]
        columns = list(first) if isinstance(first, dict) else []
    used = [next((key for key in keys if key in columns), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
    return [str(name) for name in columns if name not in used]


def as_numbers(
    labels: list[Label], names: tuple[str, ...] | None
) -> tuple[torch.Tensor | None, tuple[str, ...] | None]:
    """Labels int64 [N] and the names of the classes; the names of items become numbers.

    The order of the names is that of `names`, or else of the alphabet. Without labels: None, and `names`.
    ValueError if some items have none, or some have numbers and some names.
    """
    missing = [label is None for label in labels]
    if all(missing):
        return None, names
    if any(missing):
        raise ValueError(f"item {missing.index(True)} of the data set has no label, and others have one")
    words = [label for label in labels if isinstance(label, str)]
    if not words:
        return torch.tensor(labels, dtype=torch.int64, device="cpu"), names
    if len(words) < len(labels):
        raise ValueError("some labels of the data set are names, and some are numbers")
    if names is None or not set(words) <= set(names):
        names = tuple(sorted(set(words)))
    index = {name: number for number, name in enumerate(names)}
    return torch.tensor([index[word] for word in words], device="cpu"), names
