"""Reads folders and zips of images, with labels from class folders or a dataset.json."""

import json
import os
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from ..utils.memory import check_fits
from ..utils.words import counted
from .decoding import Decoder, channels_of_files, decode_into_cache, sizes_of_files
from .image_files import LABELS_FILE, ImageFiles, open_files
from .image_set import ImageSet, Survey


def read_images(
    path: str | os.PathLike,
    *,
    channels: int | None = None,
    size: int | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> ImageSet:
    """All images of a folder or zip (PNG, JPEG, WebP, BMP, first frame of a GIF), in the order of names.

    Images in subfolders, class/name.png, are labelled by the subfolders in alphabetical order. A dataset.json
    beside them labels them instead, by {"labels": [["00000/img00000000.png", 6], ...]}, or leaves them
    without labels, by {"labels": null} (the format of EDM's and StyleGAN's data sets). Otherwise there are no
    labels. Hidden files, `__MACOSX` and files other than images are ignored. Links to folders are followed.
    Images are turned upright by their EXIF orientation.

    channels: 1 or 3, to which all images are converted (ITU-R 601 luma; transparency is dropped; 16 bits lose
    the lower 8); by default 1 if all images are grey, otherwise 3. size: crop the square in the middle and
    scale it (Lanczos) to size x size; by default all images must have one size. cache: a folder for the
    decoded images, which are then mapped into memory instead of read; the next call finds them there unless a
    file or an option has changed. progress: show a bar with images/s.

    ValueError, naming the file, if it is missing, damaged, encrypted, too large, of another size, without a
    label, or in a class without images.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if size is not None and not 1 <= size <= 8192:
        raise ValueError(f"size must be in 1..8192, not {size}")
    with open_files(Path(path)) as source:
        labels, classes = _labels(source)
        if channels is None:
            channels = channels_of_files(source)
        decoder = Decoder(source, channels, size)
        if cache is None:
            check_fits(f"{counted(len(source.names), 'image')} of {path}", decoder.bytes, torch.device("cpu"))
            images = np.empty(decoder.shape, np.uint8)
            decoder.fill(images, progress)
        else:
            images = decode_into_cache(source, decoder, Path(cache), progress)
    return ImageSet(torch.from_numpy(images), labels, classes, str(path))


def survey(path: str | os.PathLike) -> Survey:
    """Number, channels and sizes of the images of a folder or zip, without decoding them.

    Of many images, the sizes are those of a part. ValueError as from `read_images`.
    """
    with open_files(Path(path)) as source:
        labels, classes = _labels(source)
        sizes, channels = sizes_of_files(source), channels_of_files(source)
    found = Survey.of(len(source.names), channels, sizes, labels is not None)
    if labels is None:
        return found
    count = len(classes) if classes else int(labels.max()) + 1
    return found._replace(classes=count, class_names=classes)


def _labels(source: ImageFiles) -> tuple[torch.Tensor | None, tuple[str, ...] | None]:
    """Labels of the images and names of the classes, from a dataset.json or from the class folders."""
    if LABELS_FILE in source.stamps:
        return _listed_labels(source), None
    parts = [PurePosixPath(name).parts for name in source.names]
    top = 0  # the depth of the class folders: a folder above all of them is no class
    while min(map(len, parts)) > top + 2 and len({names[top] for names in parts}) == 1:
        top += 1
    above = "/".join((*parts[0][:top], ""))
    loose = [name for name, names in zip(source.names, parts, strict=True) if len(names) == top + 1]
    if len(loose) == len(source.names):
        return None, None
    if loose:
        raise ValueError(f"{source.path}/{loose[0]} is in no class folder, but other images are in one")
    classes = sorted({names[top] for names in parts})
    found = {folder[len(above) :] for folder in source.folders if folder.startswith(above)}
    empty = sorted(folder for folder in found - set(classes) if folder and "/" not in folder)
    if empty:
        raise ValueError(f"the class folder {source.path}/{above}{empty[0]} holds no images")
    index = {name: label for label, name in enumerate(classes)}
    return torch.tensor([index[names[top]] for names in parts], device="cpu"), tuple(classes)


def _listed_labels(source: ImageFiles) -> torch.Tensor | None:
    """Labels from a dataset.json, None for null; ValueError unless it gives each image one label."""
    where = f"{source.path}/{LABELS_FILE}"
    try:
        entries = json.loads(source.read(LABELS_FILE))["labels"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{where} must be a JSON object with "labels": {error}') from error
    if entries is None:
        return None
    try:
        labels = {str(name).replace("\\", "/"): label for name, label in entries}
    except (TypeError, ValueError) as error:
        raise ValueError(f"the labels in {where} must be pairs [name, label]") from error
    if len(labels) < len(entries):
        counts = Counter(str(name).replace("\\", "/") for name, _ in entries)
        raise ValueError(f"{where} labels {counts.most_common(1)[0][0]} more than once")
    names = set(source.names)
    for name, label in labels.items():
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 2**31:
            raise ValueError(
                f"the label of {name} in {where} must be a whole number from 0 on, not {label!r}"
            )
        if name not in names:
            raise ValueError(f"{where} labels {name}, which is not there")
    missing = [name for name in source.names if name not in labels]
    if missing:
        raise ValueError(f"{where} has no label for {missing[0]}")
    return torch.tensor([labels[name] for name in source.names], device="cpu")
