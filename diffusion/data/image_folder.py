"""Images from a folder or a zip, decoded once into memory or into a file that is mapped into it."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image
from tqdm import tqdm

from ..storage.atomic import remove_leftovers, replacing
from ..storage.locks import locked
from ..storage.reading import is_folder, name_of, open_regular, read_bytes, reading_archive
from ..utils.memory import check_fits

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
MOST_BYTES = 2**28  # of one file
MOST_PIXELS = 2**26  # of one image
LABELS = "dataset.json"
WITH_ORIENTATION = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}  # where Pillow looks
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
CHUNK = 256  # images that are decoded between two looks at the progress


class ImageSet(NamedTuple):
    """images: uint8 [N, C, H, W]; labels: int64 [N], or None; classes: their names, if known; name: whose."""

    images: torch.Tensor
    labels: torch.Tensor | None
    classes: tuple[str, ...] | None
    name: str


def read_images(
    path: str | os.PathLike,
    *,
    channels: int | None = None,
    size: int | None = None,
    cache: str | os.PathLike | None = None,
    progress: bool = False,
) -> ImageSet:
    """All images of a folder or zip (PNG, JPEG, WebP, BMP, first frame of a GIF), in the order of names.

    In subfolders, class/name.png, they are labelled by the subfolders in alphabetical order. A dataset.json
    beside them, {"labels": [["00000/img00000000.png", 6], ...]}, labels them instead, or, {"labels": null},
    leaves them unlabelled (the format of EDM's and StyleGAN's data sets). Otherwise there are no labels.
    Hidden files, `__MACOSX` and other files than images are passed over. Links to folders are followed.
    Images are turned as their EXIF orientation says.

    channels: 1 or 3, which all are converted to (ITU-R 601 luma; transparency is dropped; 16 bits lose the
    lower 8); by default 1 if all are gray. size: crop the square in the middle and scale it (Lanczos) to
    size x size; by default all must have one size. cache: a folder for the decoded images, which are then
    mapped into memory instead of read; the next call finds them there unless a file or option has changed.

    ValueError, naming the file: what is missing, damaged, encrypted, too large, of another size, without a
    label, or in a class without images.
    """
    if channels not in (None, 1, 3):
        raise ValueError(f"images have 1 or 3 channels, not {channels}")
    if size is not None and not 1 <= size <= 8192:
        raise ValueError(f"size must be in 1..8192, not {size}")
    with _open(Path(path)) as source:
        labels, classes = _labels(source)
        if channels is None:
            channels = _channels(source)
        decoder = _Decoder(source, channels, size)
        if cache is None:
            check_fits(f"{len(source.names):,} images of {path}", decoder.bytes, torch.device("cpu"))
            images = np.empty(decoder.shape, np.uint8)
            decoder.fill(images, progress)
        else:
            images = _cached(source, decoder, Path(cache), progress)
    return ImageSet(torch.from_numpy(images), labels, classes, str(path))


def channels_of(path: str | os.PathLike) -> int:
    """1 if all images of a folder or zip are grey, otherwise 3; ValueError as from `read_images`."""
    with _open(Path(path)) as source:
        return _channels(source)


class _Files:
    """names: of the images, sorted. folders: of all folders. stamps: what changes when a file does."""

    def __init__(self, path: Path, stamps: dict[str, tuple], folders: set[str]):
        self.path = path
        self.names = sorted(name for name in stamps if _is_image(name))
        self.folders = {name for name in folders if not _is_hidden(name)}
        self.stamps = stamps
        if not self.names:
            raise ValueError(f"{path} holds no images ({', '.join(FORMATS)})")

    def read(self, name: str) -> bytes:
        """The bytes of a file, ValueError if there are too many or it cannot be read."""
        raise NotImplementedError


class _Folder(_Files):
    def __init__(self, path: Path):
        stamps, folders, top = {}, set(), PurePosixPath()
        # Where each folder was found first; those above the set are, as it were, at its top.
        found = {_identity(folder): top for folder in Path(os.path.realpath(path)).parents}
        starts = [(os.fspath(path), top)]  # and the links that lead to folders, as they are met
        for start, name_of_start in starts:
            for where, below, files in os.walk(start, onerror=_fail):
                relative = name_of_start / Path(where).relative_to(start).as_posix()
                first = found.setdefault(_identity(where), relative)
                if first is not relative:
                    below.clear()
                    if relative.is_relative_to(first):  # it leads back up
                        folders.discard(relative.as_posix())
                        continue
                    raise ValueError(f"{path}/{relative} leads to {path}/{first}, which would be read twice")
                below[:] = [name for name in below if not _is_hidden(name)]
                folders |= {(relative / name).as_posix() for name in below}
                links = [name for name in sorted(below) if os.path.islink(os.path.join(where, name))]
                starts += [(os.path.join(where, name), relative / name) for name in links]
                for name in files:
                    inside = (relative / name).as_posix()
                    if _is_image(inside) or inside == LABELS:
                        stamps[inside] = _stamp(os.path.join(where, name))
                    elif "." not in name and not os.path.exists(os.path.join(where, name)):
                        _stamp(os.path.join(where, name))  # perhaps the link to a class that is not there
        super().__init__(path, stamps, folders)

    def read(self, name: str) -> bytes:
        return read_bytes(os.path.join(self.path, name), MOST_BYTES)


class _Zip(_Files):
    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self.archive, stamps, folders = archive, {}, set()
        for entry in archive.infolist():
            if entry.is_dir():
                folders.add(entry.filename.rstrip("/"))
            elif entry.filename in stamps:
                raise ValueError(f"{path} holds {entry.filename} twice")
            elif entry.flag_bits & 1:
                raise ValueError(f"{path}/{entry.filename} is encrypted")
            else:
                stamps[entry.filename] = (entry.file_size, entry.CRC)
        super().__init__(path, stamps, folders)

    def read(self, name: str) -> bytes:
        with reading_archive(f"{self.path}/{name}"), self.archive.open(name) as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"cannot read {self.path}/{name}: it is larger than {MOST_BYTES >> 20} MiB")
        return data


def _fail(error: OSError) -> None:
    raise ValueError(f"cannot read {error.filename}: {error.strerror}") from error


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    """The same for all names of a folder."""
    try:
        status = os.stat(folder)
    except OSError as error:
        _fail(error)
    return status.st_dev, status.st_ino


def _stamp(path: str) -> tuple[int, int]:
    """Of a file; ValueError for a broken link, a pipe or a device, which might never end."""
    try:
        status = os.stat(path)
    except OSError as error:
        _fail(error)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"cannot read {path}: it is no regular file")
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _open(path: Path) -> Iterator[_Files]:
    if is_folder(path):
        yield _Folder(path)
        return
    if not os.path.lexists(path):
        raise ValueError(f"there is no data set, folder or zip {str(path)!r}")
    with open_regular(path, math.inf) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"{path} is no folder and no zip that can be read: {error}") from error
        with archive:
            yield _Zip(path, archive)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in FORMATS and not _is_hidden(name)


def _labels(source: _Files) -> tuple[torch.Tensor | None, tuple[str, ...] | None]:
    """Labels of the images and their names; of a dataset.json, or of folders."""
    if LABELS in source.stamps:
        return _listed_labels(source), None
    parts = [PurePosixPath(name).parts for name in source.names]
    top = 0  # a folder that holds all of the class folders is not one itself
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


def _listed_labels(source: _Files) -> torch.Tensor | None:
    where = f"{source.path}/{LABELS}"
    try:
        entries = json.loads(source.read(LABELS))["labels"]
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


def _image(source: _Files, name: str) -> Image.Image:
    """An image that is opened, but not yet decoded."""
    data = source.read(name)
    try:
        image = Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))
    except Exception as error:
        raise _undecodable(source, name, error) from error
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{source.path}/{name} is too large: {image.width} x {image.height}")
    return image


def _undecodable(source: _Files, name: str, error: Exception) -> ValueError:
    reason = "no image" if isinstance(error, PIL.UnidentifiedImageError) else error
    return ValueError(f"{source.path}/{name} cannot be decoded: {reason}".replace("\n", " "))


def _channels(source: _Files) -> int:
    return 3 if any(_is_colour(source, name) for name in source.names) else 1


def _is_colour(source: _Files, name: str) -> bool:
    return not _image(source, name).mode.startswith(("1", "L", "I", "F"))


class _Decoder:
    """What turns the files into one array uint8 [N, C, H, W]; shape and bytes are of that."""

    def __init__(self, source: _Files, channels: int, size: int | None):
        self.source, self.channels, self.size = source, channels, size
        self.width, self.height = (size, size) if size else self._upright(source.names[0]).size
        self.shape = (len(source.names), channels, self.height, self.width)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def fill(self, images: np.ndarray, progress: bool) -> None:
        """Decodes all, with as many threads as PyTorch uses."""

        def decode(index: int) -> None:
            images[index] = self._decode(self.source.names[index])

        count = len(images)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            bar = tqdm(total=count, unit=" images", desc=str(self.source.path), disable=not progress)
            with bar:
                for start in range(0, count, CHUNK):
                    part = range(start, min(count, start + CHUNK))
                    for _ in threads.map(decode, part):
                        pass
                    bar.update(len(part))

    def _decode(self, name: str) -> np.ndarray:
        image = self._upright(name)
        if self.size is None and (image.height, image.width) != (self.height, self.width):
            raise ValueError(
                f"images of one size are needed, but {self.source.path}/{name} is {image.width} x "
                f"{image.height}, and {self.source.names[0]} is {self.width} x {self.height}; make them of "
                "one size, or train with --resize"
            )
        if self.size is not None:
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((self.size, self.size), Image.Resampling.LANCZOS)
        pixels = np.asarray(image)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def _upright(self, name: str) -> Image.Image:
        """An image as viewers show it, in 8 bits and the channels that are asked for."""
        image = _image(self.source, name)
        try:
            image.load()
            turn = _turn(image)
            image = _eight_bits(image).convert("L" if self.channels == 1 else "RGB")
            return image if turn is None else image.transpose(turn)
        except Exception as error:
            raise _undecodable(self.source, name, error) from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How to turn or mirror an image that is loaded, by its EXIF or XMP."""
    if image.info.keys().isdisjoint(WITH_ORIENTATION):  # asked first, because parsing takes time
        return None
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF, which raises in many ways; viewers show the image as it lies
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16 bits at 255 when it converts them."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    return image


def _cached(source: _Files, decoder: _Decoder, folder: Path, progress: bool) -> np.ndarray:
    """The decoded images in a file of a folder, which is made where it is missing or damaged.

    Copy-on-write, so that the tensor on it may be taken for a writable one. Processes that want the same
    file at the same time wait for the one that makes it.
    """
    about = [2, PIL.__version__, decoder.shape, decoder.size, [(n, source.stamps[n]) for n in source.names]]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = folder / f"{source.path.resolve().stem}-{digest}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return _mapped(path, decoder.shape)
    with locked(path.with_suffix(".lock"), wait=True):
        with contextlib.suppress(OSError, ValueError, EOFError):  # made by the one that was waited for
            return _mapped(path, decoder.shape)
        remove_leftovers(folder, path.name)
        with replacing(path) as (temporary,):
            images = np.lib.format.open_memmap(temporary, "w+", np.uint8, decoder.shape)
            _reserve(temporary)
            decoder.fill(images, progress)
            images.flush()
    return _mapped(path, decoder.shape)


def _reserve(path: Path) -> None:
    """Takes the room that a file needs: a process that writes to a mapping on a full disk is killed."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve
                raise


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    with open_regular(path, math.inf) as file:
        images = np.load(name_of(file, path), mmap_mode="c", allow_pickle=False)
    if images.shape != shape or images.dtype != np.uint8 or not images.flags.c_contiguous:
        raise ValueError(f"{path} holds something else")
    return images
