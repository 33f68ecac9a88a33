"""Shards of a run: .npz files with a digest, which reveals damage and changes."""

import hashlib
import json
import os
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..utils.errors import one_line
from .images import save_npz, to_uint8
from .reading import open_regular

HEADER_BYTES = 4096  # at most, before the numbers of an array in an .npz


def write_shard(
    path: str | os.PathLike, x: torch.Tensor, ids: Sequence[int], labels: Sequence[int] | None, run: str
) -> None:
    """Writes images [N, C, H, W] in [-1, 1] with their ids, labels and `sha256`, whole or not at all.

    run: the `run_digest`, on which the shard's own digest depends. A link is replaced, not followed: it may
    lead to another shard. ValueError if the file cannot be written.
    """
    arrays = _described(ids, labels) | {"images": to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()}
    if os.path.islink(path):
        try:
            os.unlink(path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {one_line(error)}") from error
    save_npz(x, path, labels, sample_ids=arrays["sample_ids"], sha256=_digest(arrays, run))


def run_digest(settings: dict[str, Any]) -> str:
    """SHA-256 of the settings that decide the images of a run, as run.json holds them."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def was_altered(path: str | os.PathLike, run: str) -> bool:
    """Whether the arrays of an .npz differ from those that `write_shard` wrote; the file must be readable."""
    with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return str(arrays.pop("sha256", "")) != _digest(arrays, run)


def what_is_wrong(
    path: str | os.PathLike,
    shape: tuple[int, int, int],
    ids: Sequence[int],
    labels: Sequence[int] | None,
    run: str,
) -> str | None:
    """The reason why a file is not `write_shard`'s shard of these ids and labels, or None if it is.

    shape: [C, H, W] of the images. Every byte of every array is read.
    """
    channels, height, width = shape
    described = _described(ids, labels)
    expected = {name: (array.dtype, array.shape) for name, array in described.items()}
    expected["images"] = np.dtype(np.uint8), (len(ids), height, width, channels)
    expected["sha256"] = np.dtype("<U64"), ()
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
            if missing := sorted(expected.keys() - members.keys()):
                return f"it has no {missing[0]}"
            if len(archive.infolist()) > len(expected):
                return "it holds other arrays than were written"
            for name, (dtype, size) in expected.items():  # before a small file becomes a large array
                if members[name].file_size > dtype.itemsize * np.prod(size, dtype=np.int64) + HEADER_BYTES:
                    return f"its {name} are of another shape or type"
            if damaged := archive.testzip():
                return f"the checksum of its {damaged.removesuffix('.npy')} is wrong"
            arrays = {}
            for name in expected:
                with archive.open(members[name]) as member:
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except Exception as error:  # errors of a damaged archive have no common base
        return f"it cannot be read ({one_line(error)})"
    for name, (dtype, size) in expected.items():
        if arrays[name].dtype != dtype or arrays[name].shape != size:
            return f"its {name} are of another shape or type"
    for name, array in described.items():
        if not np.array_equal(arrays[name], array):
            return f"its {name} are not those of the run"
    if arrays.pop("sha256").item() != _digest(arrays, run):
        return "its images are not those that were written, by their SHA-256"
    return None


def _described(ids: Sequence[int], labels: Sequence[int] | None) -> dict[str, np.ndarray]:
    arrays = {"sample_ids": np.asarray(ids, dtype=np.int64)}
    return arrays if labels is None else arrays | {"labels": np.asarray(labels, dtype=np.int64)}


def _digest(arrays: dict[str, np.ndarray], run: str) -> str:
    digest = hashlib.sha256(run.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
