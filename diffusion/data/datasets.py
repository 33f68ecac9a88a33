"""Data sets of PyTorch and of Hugging Face, of any length and of images of any size."""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..utils.errors import one_line
from ..utils.memory import free_memory
from ..utils.validation import whole_number
from .dataset_items import (
    Label,
    as_numbers,
    changes_labels,
    class_names,
    item,
    known_labels,
    unused_columns,
)
from .decoding import middle_square, upright
from .image_set import Survey

SURVEYED = 200  # items that are read before a size is chosen
DIGESTED = 16  # items whose pixels are part of the digest
MEMORY_SHARE = 4  # a data set of more than this part of the free memory is read as it is needed


def is_dataset(data: object) -> bool:
    """Whether an object has items by number and a length, as PyTorch's and Hugging Face's data sets do."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, str | bytes)


class DatasetImages:
    """The images of a data set, uint8 [N, C, H, W], decoded as they are asked for or held in memory.

    dataset: its items are images, or pairs or dictionaries of an image and a label; an image is one of PIL,
    or uint8, [H, W], [H, W, C] or [C, H, W]. channels: 1 or 3, to which images are converted. size: height
    and width; an image of another size becomes the square in its middle, scaled. indices: of the items that
    are meant, by default all. keep_colour: refuse a colour image where `channels` is 1. decoded: the images
    of all items, uint8 [N, C, H, W], once they are in memory.

    ValueError, with the number of the item, for another image.
    """

    dtype = torch.uint8

    def __init__(
        self,
        dataset: Any,
        channels: int,
        size: tuple[int, int],
        indices: torch.Tensor | None = None,
        *,
        keep_colour: bool = False,
    ):
        self.dataset, self.channels, self.size, self.keep_colour = dataset, channels, size, keep_colour
        self.indices = torch.arange(len(dataset), device="cpu") if indices is None else indices
        self.shape = torch.Size((len(self.indices), channels, *size))
        self.decoded: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        """The images uint8 [B, C, H, W] at positions int64 [B], or one [C, H, W] at an integer."""
        if self.decoded is not None:
            return self.decoded[self.indices[index]]
        if isinstance(index, torch.Tensor):
            return torch.stack([self[position] for position in index.tolist()])
        return self.read(int(self.indices[index]))[0]

    def read(self, number: int) -> tuple[torch.Tensor, Label]:
        """The image uint8 [C, H, W] and the label of an item of the data set."""
        image, label = item(self.dataset, number)
        array = _array(image, self.channels, self.size, number, self.keep_colour)
        return torch.from_numpy(np.ascontiguousarray(array)), label

    def some(self, indices: torch.Tensor) -> "DatasetImages":
        """The images at these positions, int64 [M]."""
        chosen = self.indices[indices]
        found = DatasetImages(self.dataset, self.channels, self.size, chosen, keep_colour=self.keep_colour)
        found.decoded = self.decoded
        return found

    def batches(self, order: Iterable[list[int]], workers: int) -> Iterator[torch.Tensor]:
        """The images uint8 [B, C, H, W] of each list of positions, in turn, decoded ahead by processes.

        workers: number of processes; 0 decodes in this one.
        """
        if self.decoded is not None:
            return (self[torch.tensor(positions, device="cpu")] for positions in order)
        return iter(DataLoader(self, batch_sampler=order, num_workers=workers, collate_fn=torch.stack))  # type: ignore[arg-type]

    def digest(self) -> bytes:
        """SHA-256 of the shape, the indices, and the pixels of some images: reading all would take long.

        It is the same in memory and not. Pixels are left out where an item gives others each time, as with
        random transforms.
        """
        digest = hashlib.sha256(f"{[*self.shape]} {len(self.dataset)}".encode())
        digest.update(self.indices.numpy().data)
        count = min(DIGESTED, len(self))
        numbers = [int(self.indices[position * len(self) // count]) for position in range(count)]
        first, second = ([self.read(number)[0] for number in numbers] for _ in range(2))
        if all(map(torch.equal, first, second)):
            for pixels in first:
                digest.update(pixels.numpy().data)
        return digest.digest()


class LoadedSet(NamedTuple):
    """Images with labels as an `ImageSet`, or those of a data set. remark: for the line about them."""

    images: torch.Tensor | DatasetImages
    labels: torch.Tensor | None
    classes: tuple[str, ...] | None
    name: str
    remark: str = ""


def read_dataset(
    dataset: Any,
    choose: Callable[[Survey], tuple[int, tuple[int, int]]],
    *,
    workers: int = 0,
    stream: bool | None = None,
    progress: bool = False,
) -> LoadedSet:
    """A data set with labels, its images in memory where they fit, otherwise decoded as they are needed.

    choose: from what there is to the channels and the size, height and width, of the images. workers: number
    of processes that decode. stream: whether to decode images as they are needed; by default if they would
    take more than a fourth of the free memory. progress: show a bar.

    The labels are those of the items. They come from a column or an attribute of the data set, without
    reading all items, where images are not held in memory and the labels of the surveyed items are the same.
    ValueError for a data set without random access, without items, or of other images or labels.
    """
    workers = whole_number("workers", workers, 0)
    if stream not in (None, True, False):
        raise ValueError(f"stream must be True, False or None, not {stream!r}")
    _check(dataset)
    found, surveyed = _survey(dataset)
    channels, size = choose(found)
    images = DatasetImages(dataset, channels, size, keep_colour=found.channels == 1)
    if stream is None:
        free = free_memory(torch.device("cpu"))
        stream = free is not None and images.shape.numel() > free // MEMORY_SHARE
    known = known_labels(dataset)
    trusted = known is not None and not changes_labels(dataset)
    trusted &= all(label in (None, known[number]) for number, label in surveyed.items()) if known else False
    labels = known
    if not (stream and trusted):
        own = _read_all(images, workers, not stream, progress)
        labels = known if known is not None and all(label is None for label in own) else own
    names, remark = class_names(dataset), ""
    if found.channels == 3 and channels == 1:
        remark = ", colour is dropped"
    if unused := unused_columns(dataset):
        remark += f", unused columns: {', '.join(unused)}"
    if names is not None and labels != known and (known is not None or changes_labels(dataset)):
        names, remark = None, f"{remark}, labels of the items without the data set's class names"
    numbers, names = as_numbers(labels or [], names)
    return LoadedSet(images, numbers, names, type(dataset).__name__, remark)


def _read_all(images: DatasetImages, workers: int, keep: bool, progress: bool) -> list[Label]:
    """The labels of all items. keep: hold the images in memory, too."""
    whole = torch.empty(images.shape, dtype=torch.uint8, device="cpu") if keep else None
    found: list[Label] = []
    loader = DataLoader(_Items(images), batch_size=64, num_workers=workers, collate_fn=_batch)
    with tqdm(total=len(images), unit=" images", desc="reading", disable=not progress) as bar:
        for pixels, labels in loader:
            if whole is not None:
                whole[len(found) : len(found) + len(pixels)] = pixels
            found += labels
            bar.update(len(pixels))
    images.decoded = whole
    return found


class _Items(torch.utils.data.Dataset):
    """Images with their labels."""

    def __init__(self, images: DatasetImages):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, Label]:
        return self.images.read(number)


def _batch(items: list[tuple[torch.Tensor, Label]]) -> tuple[torch.Tensor, list[Label]]:
    return torch.stack([pixels for pixels, _ in items]), [label for _, label in items]


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
    """The survey of a data set, by up to SURVEYED of its items."""
    _check(dataset)
    return _survey(dataset)[0]


def _survey(dataset: Any) -> tuple[Survey, dict[int, Label]]:
    """The survey of a data set, and the labels of the items that were read, by their numbers."""
    count = min(SURVEYED, len(dataset))
    sizes, grey, labels = [], True, {}
    for k in range(count):
        number = k * len(dataset) // count
        image, labels[number] = item(dataset, number)
        picture = _picture(image, number)
        sizes.append((picture.height, picture.width))
        grey &= _is_grey(picture)
    labelled = any(label is not None for label in labels.values()) or known_labels(dataset) is not None
    return Survey.of(len(dataset), 1 if grey else 3, sizes, labelled), labels


def _is_grey(picture: Image.Image) -> bool:
    return picture.mode in ("1", "L", "LA") or picture.mode.startswith(("I", "F"))


def _picture(image: Any, number: int) -> Image.Image:
    """An image of a data set as one of PIL, upright."""
    if isinstance(image, dict) and image.get("bytes"):  # of an undecoded column of Hugging Face
        image = io.BytesIO(image["bytes"])
    try:
        if isinstance(image, io.BytesIO):
            image = Image.open(image)
        if isinstance(image, Image.Image):
            return upright(image)
        array = np.asarray(image)
    except (OSError, ValueError, TypeError, SyntaxError, RuntimeError) as error:
        reason = one_line(error)
        raise ValueError(f"image {number} of the data set cannot be decoded: {reason}") from error
    if array.ndim == 3 and array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if array.dtype != np.uint8 or not is_image:
        raise ValueError(
            f"image {number} of the data set is {array.dtype} {list(array.shape)}, and must be one of PIL or "
            "uint8 in 0..255; leave out ToTensor() and Normalize()"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _array(
    image: Any, channels: int, size: tuple[int, int], number: int, keep_colour: bool = False
) -> np.ndarray:
    """An image of a data set as uint8 [C, H, W]."""
    picture = _picture(image, number)
    if keep_colour and channels == 1 and not _is_grey(picture):
        raise ValueError(
            f"image {number} of the data set has colour (mode {picture.mode}), and those read first are "
            "grey; make all images of one mode"
        )
    picture = picture.convert("L" if channels == 1 else "RGB")
    if (picture.height, picture.width) != size:
        if size[0] != size[1]:
            raise ValueError(
                f"image {number} of the data set is {picture.width} x {picture.height}, and the model's are "
                f"{size[1]} x {size[0]}"
            )
        picture = middle_square(picture, size[0])
    array = np.array(picture)  # writable, as PyTorch wants it
    return array[None] if channels == 1 else array.transpose(2, 0, 1)
