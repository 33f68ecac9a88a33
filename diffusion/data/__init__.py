"""Data sets for training and evaluation. torchvision is imported here only, and only when a set is read."""

import os
from pathlib import Path

import torch

from ..storage.reading import is_folder
from ..utils.validation import choice
from .image_folder import ImageSet, read_images

DATASETS = ("mnist", "cifar10")
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


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
    """Images by name, "mnist" or "cifar10" (from torchvision's files in data_dir), or from a folder or zip.

    split, download: of a named set, see `load_mnist`. channels, size, cache, progress: of a folder or zip,
    see `image_folder.read_images`. ValueError for what cannot be read, or a named set without data_dir.
    """
    if not os.fspath(source):
        raise ValueError("there is no data set, folder or zip ''")
    if str(source) not in DATASETS:
        return read_images(source, channels=channels, size=size, cache=cache, progress=progress)
    if data_dir is None:
        raise ValueError(f"where is {source}? give its folder, torchvision's, as --data-dir")
    load = {"mnist": load_mnist, "cifar10": load_cifar10}[str(source)]
    images, labels = load(data_dir, split, download)
    classes = tuple("0123456789") if source == "mnist" else CIFAR10_CLASSES
    return ImageSet(images, labels, classes, f"{source}, {split} split")


def load_cifar10(
    data_dir: str | os.PathLike, split: str, download: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """CIFAR-10 (Krizhevsky 2009) from torchvision's files, `data_dir/cifar-10-batches-py`.

    split: "train" (50,000 images) or "test" (10,000). Returns images uint8 [N, 3, 32, 32] and labels int64
    [N]. Errors as for `load_mnist`. These files are pickles: torchvision unpickles none whose MD5 digest is
    not the original's.
    """
    dataset = _torchvision("CIFAR10", "cifar-10-batches-py", data_dir, split, download)
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets, device="cpu")


def load_mnist(
    data_dir: str | os.PathLike, split: str, download: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST (LeCun et al. 1998) from torchvision's files, `data_dir/MNIST/raw/*-ubyte`.

    split: "train" (60,000 digits) or "test" (10,000). download: let torchvision fetch missing files.
    Returns images uint8 [N, 1, 28, 28] and labels int64 [N]. ValueError if torchvision cannot be
    imported, or if the files are missing or damaged.
    """
    dataset = _torchvision("MNIST", "MNIST/raw", data_dir, split, download)
    images, labels = dataset.data.unsqueeze(1).contiguous(), dataset.targets.long()
    if images.shape[1:] != (1, 28, 28) or len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"cannot read MNIST in {data_dir}: images {list(images.shape)}, labels {len(labels)}"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"cannot read MNIST in {data_dir}: labels reach {labels.min()} to {labels.max()}")
    return images, labels


def _torchvision(name: str, files: str, data_dir: str | os.PathLike, split: str, download: bool):
    """One of torchvision's data sets, which keeps its files in a folder of this name."""
    choice("split", split, ("train", "test"))
    try:
        from torchvision import datasets
    except Exception as error:  # beside a torch it was not built for, torchvision raises RuntimeError
        raise ValueError(
            f"{name} is read by torchvision, which cannot be imported ({error}); "
            'pip install "fused-diffusion[train]"'
        ) from error
    folder = Path(data_dir) / files
    there = is_folder(folder)
    try:
        return getattr(datasets, name)(root=str(data_dir), train=split == "train", download=download)
    except Exception as error:
        missing = f"there is no {folder}; give the folder above {files}, or download it"
        reason = (str(error) or type(error).__name__) if there or download else missing
        raise ValueError(f"cannot read {name} in {data_dir}: {reason}".replace("\n", " ")) from error
