"""Data sets for training and evaluation. torchvision is imported here only, and only when a set is read."""

import os
from pathlib import Path

import torch

DATASETS = ("mnist",)


def load_mnist(
    data_dir: str | os.PathLike, split: str, download: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST (LeCun et al. 1998) from torchvision's files, `data_dir/MNIST/raw/*-ubyte`.

    split: "train" (60,000 digits) or "test" (10,000). download: let torchvision fetch missing files.
    Returns images uint8 [N, 1, 28, 28] and labels int64 [N]. ValueError if torchvision cannot be
    imported, or if the files are missing or damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; choose from: train, test")
    try:
        from torchvision.datasets import MNIST
    except Exception as error:  # beside a torch it was not built for, torchvision raises RuntimeError
        raise ValueError(
            f"MNIST is read by torchvision, which cannot be imported ({error}); "
            'pip install "fused-diffusion[train]"'
        ) from error
    folder = Path(data_dir) / "MNIST" / "raw"
    try:
        dataset = MNIST(root=str(data_dir), train=split == "train", download=download)
    except Exception as error:
        missing = "" if folder.is_dir() else f"there is no {folder}; give its parent's parent, or download it"
        raise ValueError(f"cannot read MNIST in {data_dir}: {missing or error}".replace("\n", " ")) from error
    images, labels = dataset.data.unsqueeze(1).contiguous(), dataset.targets.long()
    if images.shape[1:] != (1, 28, 28) or len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"cannot read MNIST in {data_dir}: images {list(images.shape)}, labels {len(labels)}"
        )
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"cannot read MNIST in {data_dir}: labels reach {labels.min()} to {labels.max()}")
    return images, labels


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 0..255 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1
