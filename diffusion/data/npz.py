"""Reads 8-bit images for evaluation: .npz files, folders of shards, and the data sets of `load_dataset`."""

import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from ..storage.reading import is_folder, open_regular, read_json, reading_archive
from ..storage.shard_files import run_digest, was_altered
from ..utils.names import own_name
from ..utils.validation import whole_numbers
from ..utils.words import counted
from . import NAMED_SETS, load_dataset
from .image_set import ImageSet

MAX_BYTES = 2**36  # bytes of one array
MAX_LABEL = 2**31 - 1
# Names of the array of images and of the arrays that may hold the labels: this package's, and those that
# np.savez gives to arrays without names, as guided-diffusion's scripts save them.
NAMES = (("images", "labels"), ("arr_0", "labels", "arr_1"))


def load_images(
    source: str | os.PathLike,
    *,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    channels: int | None = None,
    size: int | None = None,
    progress: bool = False,
) -> ImageSet:
    """Images uint8 [N, C, H, W] from a .npz file, a folder of shard-*.npz, or `data.load_dataset`.

    A .npz holds `images` uint8 [N, H, W, C] and perhaps `labels` [N], integers from 0 on, as
    `images.save_npz` writes them, or `arr_0` and perhaps `arr_1`, as guided-diffusion's scripts do. split,
    data_dir, channels, size, progress: see `data.load_dataset`. ValueError, naming the file, for anything
    else, for fewer than two images, for a folder that `shards.sample_shards` has not finished, and for a size
    with images that are no folder or zip.
    """
    path, named = Path(source), own_name(source, NAMED_SETS, "data set") is not None
    shards = sorted(path.glob("shard-*.npz")) if is_folder(path) and not named else []
    if size is not None and (shards or path.suffix.lower() == ".npz" or named):
        raise ValueError(f"--resize is for a folder or zip of images, and --reference is {source}")
    if shards:
        found = _joined([_read(shard) for shard in shards], path)
        _check_run(path, shards, len(found.images))
    elif path.suffix.lower() == ".npz":
        found = _read(path)
    else:
        found = load_dataset(
            source, split=split, data_dir=data_dir, channels=channels, size=size, progress=progress
        )
    if len(found.images) < 2:
        raise ValueError(f"{source} holds {counted(len(found.images), 'image')}; a distance needs at least 2")
    return found


def _read(path: Path) -> ImageSet:
    if not os.path.lexists(path):
        raise ValueError(f"there is no {path}")
    with (
        reading_archive(path),
        open_regular(path) as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        pairs = [pair for pair in NAMES if pair[0] in arrays.files]
        if not pairs:
            raise ValueError("it holds no array `images` or `arr_0`")
        names = [name for name in pairs[0] if name in arrays.files]
        for name in names:
            _check_size(arrays.zip, name)
        images, *labels = (arrays[name] for name in names[:2])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(
            f"the images in {path} must be uint8 [N, H, W, 1 or 3], not {images.dtype} {list(images.shape)}"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return ImageSet(tensor, _labels(labels[0], len(images), path) if labels else None, None, str(path))


def _labels(labels: np.ndarray, count: int, path: Path) -> torch.Tensor:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"the labels in {path} must be integers [{count}], not {labels.dtype} {list(labels.shape)}"
        )
    return whole_numbers(f"the labels in {path}", labels, 0, MAX_LABEL)


def _check_size(archive: zipfile.ZipFile, name: str) -> None:
    """ValueError if an array would take more than MAX_BYTES in memory: a small file can hold a large one."""
    size = archive.getinfo(f"{name}.npy").file_size
    if size > MAX_BYTES:
        raise ValueError(f"its array {name} takes {size >> 30} GiB")


def _check_run(path: Path, shards: list[Path], count: int) -> None:
    """ValueError if shards of the run in run.json are missing, or are not as they were written."""
    if not (path / "run.json").exists():
        return
    settings = read_json(path / "run.json")
    if settings.get("num") != count:
        raise ValueError(
            f"{path} holds {counted(count, 'image')} of {settings.get('num')}; finish sampling first"
        )
    for shard in shards:
        if was_altered(shard, run_digest(settings)):
            raise ValueError(
                f"{shard} does not hold what was written, by its SHA-256; sample into {path} again, which "
                "replaces it"
            )


def _joined(parts: list[ImageSet], path: Path) -> ImageSet:
    shapes = {tuple(part.images.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"the shards in {path} hold images of different shapes: {sorted(shapes)}")
    labels = [part.labels for part in parts if part.labels is not None]
    joined = torch.cat(labels) if len(labels) == len(parts) else None
    return ImageSet(torch.cat([part.images for part in parts]), joined, None, str(path))
