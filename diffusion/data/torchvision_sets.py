"""The data sets that are known by name, read by torchvision, which is imported only when one is read.

A new set is one entry of NAMED_SETS.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..storage.reading import is_folder
from ..utils.errors import one_line
from ..utils.validation import choice

Images = tuple[torch.Tensor, torch.Tensor | None]

CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)


class NamedSet(NamedTuple):
    """A data set that `load_dataset` and the command line know by its name in NAMED_SETS.

    load: (data_dir, split, download) -> images uint8 [N, C, H, W], and labels int64 [N] or None. data_dir is
    the folder that torchvision downloads to, split "train" or "test"; download allows it to fetch missing
    files. ValueError for files that are missing or damaged. classes: the names of the labels 0, 1 and so on,
    or None. shape: (C, H, W).
    """

    load: Callable[[str | os.PathLike, str, bool], Images]
    classes: tuple[str, ...] | None
    shape: tuple[int, int, int]


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


def load_cifar10(
    data_dir: str | os.PathLike, split: str, download: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """CIFAR-10 (Krizhevsky 2009) from torchvision's files, `data_dir/cifar-10-batches-py`.

    split: "train" (50,000 images) or "test" (10,000). download: let torchvision fetch missing files. Returns
    images uint8 [N, 3, 32, 32] and labels int64 [N]. ValueError as from `load_mnist`. These files are
    pickles; torchvision unpickles only files with the MD5 digest of the original.
    """
    dataset = _torchvision("CIFAR10", "cifar-10-batches-py", data_dir, split, download)
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets, device="cpu")


def _torchvision(name: str, files: str, data_dir: str | os.PathLike, split: str, download: bool) -> Any:
    """The data set that torchvision calls `name`; `files` is the folder below data_dir that holds its files.

    ValueError if torchvision cannot be imported, or cannot read the files.
    """
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
        reason = one_line(error) if there or download else missing
        raise ValueError(f"cannot read {name} in {data_dir}: {reason}") from error


NAMED_SETS = {
    "mnist": NamedSet(load_mnist, tuple("0123456789"), (1, 28, 28)),
    "cifar10": NamedSet(load_cifar10, CIFAR10_CLASSES, (3, 32, 32)),
}
