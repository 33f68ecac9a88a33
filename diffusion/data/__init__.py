"""Data sets for training and evaluation: by name, or folders and zips of images."""

import os

from ..utils.modules import importing
from ..utils.names import own_name
from .image_folder import read_images
from .image_set import ImageSet
from .torchvision_sets import NAMED_SETS, NamedSet, load_cifar10, load_mnist

__all__ = ["NAMED_SETS", "ImageSet", "NamedSet", "load_cifar10", "load_dataset", "load_mnist"]

__getattr__ = importing(__name__)


def load_dataset(
    source: str | os.PathLike,
    *,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    channels: int | None = None,
    size: int | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> ImageSet:
    """The images of a data set of NAMED_SETS, such as "mnist", or of a folder or zip.

    A name goes before a folder, see `names.own_name`.

    data_dir, split, download: for a named set, see `NamedSet`. channels, size, cache, progress: for a folder
    or zip, see `image_folder.read_images`. ValueError if the images cannot be read, or a named set is asked
    for without data_dir.
    """
    if not os.fspath(source):
        raise ValueError("there is no data set, folder or zip ''")
    name = own_name(source, NAMED_SETS, "data set")
    if name is None:
        return read_images(source, channels=channels, size=size, cache=cache, progress=progress)
    if data_dir is None:
        raise ValueError(f"{source} needs --data-dir, the folder that torchvision downloads to")
    named = NAMED_SETS[name]
    images, labels = named.load(data_dir, split, download)
    return ImageSet(images, labels, named.classes, f"{name}, {split} split")
