"""Data sets of PyTorch and of Hugging Face, of any length and of images of any size."""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..utils.memory import free_memory
from .decoding import middle_square, upright
from .image_set import Survey

IMAGE_KEYS = ("image", "img", "images", "pixel_values")
LABEL_KEYS = ("label", "labels", "fine_label", "target", "class")
SURVEYED = 200  # items that are read before a size is chosen
DIGESTED = 16  # items whose pixels are part of the digest
MEMORY_SHARE = 4  # a data set of more than this part of the free memory is read as it is needed


def is_dataset(data: object) -> bool:
    """Whether an object has items by number and a length, as PyTorch's and Hugging Face's data sets do."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes)


class DatasetImages:
    """The images of a data set, decoded as they are asked for, uint8 [N, C, H, W].

    dataset: its items are images, or pairs or dictionaries of an image and a label; an image is one of PIL,
    or uint8, [H, W], [H, W, C] or [C, H, W]. channels: 1 or 3, to which images are converted. size: height
    and width; an image of another size becomes the square in its middle, scaled. indices: of the items that
    are meant, by default all.

    ValueError, with the number of the item, for another image.
    """

    dtype = torch.uint8

    def __init__(
        self, dataset: Any, channels: int, size: tuple[int, int], indices: torch.Tensor | None = None
    ):
        self.dataset, self.channels, self.size = dataset, channels, size
        self.indices = torch.arange(len(dataset), device="cpu") if indices is None else indices
        self.shape = torch.Size((len(self.indices), channels, *size))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        """The images uint8 [B, C, H, W] at positions int64 [B], or one [C, H, W] at an integer."""
        if isinstance(index, torch.Tensor):
            return torch.stack([self[position] for position in index.tolist()])
        return self.pixels(int(self.indices[index]))[0]

    def pixels(self, number: int) -> tuple[torch.Tensor, int]:
        """The image uint8 [C, H, W] of an item of the data set, and its label, -1 for none."""
        image, label = item(self.dataset, number)
        array = _array(image, self.channels, self.size, number)
        return torch.from_numpy(np.ascontiguousarray(array)), -1 if label is None else int(label)

    def some(self, indices: torch.Tensor) -> "DatasetImages":
        """The images at these positions, int64 [M]."""
        return DatasetImages(self.dataset, self.channels, self.size, self.indices[indices])

    def batches(self, order: Iterable[list[int]], workers: int) -> Iterator[torch.Tensor]:
        """The images uint8 [B, C, H, W] of each list of positions, in turn, decoded ahead by processes.

        workers: number of processes; 0 decodes in this one.
        """
        return iter(DataLoader(self, batch_sampler=order, num_workers=workers, collate_fn=torch.stack))  # type: ignore[arg-type]

    def digest(self) -> bytes:
        """SHA-256 of the shape, the indices, and the pixels of some images: reading all would take long."""
        digest = hashlib.sha256(f"{[*self.shape]} {len(self.dataset)}".encode())
        digest.update(self.indices.numpy().data)
        count = min(DIGESTED, len(self))
        for position in range(count):
            digest.update(self[position * len(self) // count].numpy().data)
        return digest.digest()


class LoadedSet(NamedTuple):
    """The images of a data set, in memory or decoded as they are asked for, and else as `ImageSet`."""

    images: torch.Tensor | DatasetImages
    labels: torch.Tensor | None
    classes: tuple[str, ...] | None
    name: str


def read_dataset(
    dataset: Any,
    choose: Callable[[Survey], tuple[int, tuple[int, int]]],
    *,
    workers: int = 0,
    stream: bool | None = None,
    progress: bool = False,
) -> "LoadedSet":
    """A data set as images with labels: in memory where they fit, otherwise as a `DatasetImages`.

    choose: from what there is to the channels and the size, height and width, of the images. workers: number
    of processes that decode. stream: whether to decode images as they are needed; by default if they would
    take more than a fourth of the free memory. progress: show a bar.

    The labels are those of a column or an attribute of the data set, or else of its items, which then are all
    read. ValueError for a data set without random access, without items, or of other images.
    """
    _check(dataset)
    channels, size = choose(survey_dataset(dataset))
    images = DatasetImages(dataset, channels, size)
    labels, names = known_labels(dataset), class_names(dataset)
    if stream is None:
        free = free_memory(torch.device("cpu"))
        stream = free is not None and images.shape.numel() > free // MEMORY_SHARE
    whole = None if stream else torch.empty(images.shape, dtype=torch.uint8, device="cpu")
    if whole is not None or labels is None:
        found: list[int] = []
        loader = DataLoader(_Items(images), batch_size=64, num_workers=workers)
        with tqdm(total=len(images), unit=" images", desc="reading", disable=not progress) as bar:
            for pixels, numbers in loader:
                if whole is not None:
                    whole[len(found) : len(found) + len(pixels)] = pixels
                found += numbers.tolist()
                bar.update(len(pixels))
        if labels is None and min(found) >= 0:
            labels = torch.tensor(found, device="cpu")
        elif labels is None and max(found) >= 0:
            raise ValueError(f"item {found.index(-1)} of the data set has no label, and others have one")
    return LoadedSet(images if whole is None else whole, labels, names, type(dataset).__name__)


class _Items(torch.utils.data.Dataset):
    """Images with their labels."""

    def __init__(self, images: DatasetImages):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        return self.images.pixels(number)


def _check(dataset: Any) -> None:
    if isinstance(dataset, dict):
        raise ValueError(f"give one split of the data set, such as data[{next(iter(dataset), 'train')!r}]")
    if not is_dataset(dataset):
        raise ValueError(
            f"a {type(dataset).__name__} has no items by number, which the order of the images needs; "
            "load it without streaming: images are decoded as they are needed all the same"
        )
    if len(dataset) == 0:
        raise ValueError("the data set is empty")


def survey_dataset(dataset: Any) -> Survey:
    """What a data set holds, by up to SURVEYED of its items."""
    _check(dataset)
    count = min(SURVEYED, len(dataset))
    sizes, grey, labelled = [], True, False
    for k in range(count):
        number = k * len(dataset) // count
        image, label = item(dataset, number)
        picture = _picture(image, number)
        sizes.append((picture.height, picture.width))
        grey &= picture.mode in ("1", "L", "LA") or picture.mode.startswith(("I", "F"))
        labelled |= label is not None
    return Survey.of(len(dataset), 1 if grey else 3, sizes, labelled or known_labels(dataset) is not None)


def item(dataset: Any, number: int) -> tuple[Any, Any]:
    """The image and the label of an item, None for no label."""
    found = dataset[number]
    if isinstance(found, dict):
        image = next((key for key in IMAGE_KEYS if key in found), None)
        label = next((key for key in LABEL_KEYS if key in found), None)
        if image is None:
            keys = ", ".join(map(str, found))
            raise ValueError(f"the items of the data set have no image: {keys}; rename its column to 'image'")
        return found[image], None if label is None else found[label]
    if isinstance(found, tuple | list):
        return found[0], found[1] if len(found) > 1 else None
    return found, None


def known_labels(dataset: Any) -> torch.Tensor | None:
    """The labels int64 [N] of a data set that holds them apart from its items; None for others."""
    columns = getattr(dataset, "column_names", None)
    found: Any = None
    if columns is not None:
        name = next((key for key in LABEL_KEYS if key in columns), None)
        found = None if name is None else dataset[name][:]
    elif hasattr(dataset, "dataset") and hasattr(dataset, "indices"):  # torch.utils.data.Subset
        whole = known_labels(dataset.dataset)
        return None if whole is None else whole[torch.as_tensor(dataset.indices, device="cpu")]
    else:
        found = getattr(dataset, "targets", None)
    if found is None or len(found) != len(dataset):
        return None
    labels = torch.as_tensor(found, device="cpu")
    return labels.long() if not labels.is_floating_point() and labels.ndim == 1 else None


def class_names(dataset: Any) -> tuple[str, ...] | None:
    """The names of the classes that a data set gives, or None."""
    features = getattr(dataset, "features", None)
    if features is not None:
        name = next((key for key in LABEL_KEYS if key in features), None)
        names = None if name is None else getattr(features[name], "names", None)
    else:
        names = getattr(getattr(dataset, "dataset", dataset), "classes", None)
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        return None
    return tuple(names)


def _picture(image: Any, number: int) -> Image.Image:
    """An image of a data set as one of PIL, upright."""
    if isinstance(image, dict) and image.get("bytes"):  # of an undecoded column of Hugging Face
        image = Image.open(io.BytesIO(image["bytes"]))
    if isinstance(image, Image.Image):
        return upright(image)
    array = image.numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    if array.ndim == 3 and array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if array.dtype != np.uint8 or not is_image:
        raise ValueError(
            f"image {number} of the data set is {array.dtype} {list(array.shape)}, and must be one of PIL or "
            "uint8 in 0..255; leave out ToTensor() and Normalize()"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _array(image: Any, channels: int, size: tuple[int, int], number: int) -> np.ndarray:
    """An image of a data set as uint8 [C, H, W]."""
    picture = _picture(image, number).convert("L" if channels == 1 else "RGB")
    if (picture.height, picture.width) != size:
        if size[0] != size[1]:
            raise ValueError(
                f"image {number} of the data set is {picture.width} x {picture.height}, and the model's are "
                f"{size[1]} x {size[0]}"
            )
        picture = middle_square(picture, size[0])
    array = np.asarray(picture)
    return array[None] if channels == 1 else array.transpose(2, 0, 1)
