"""The files of a folder or zip of images, by name."""

import contextlib
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NoReturn

from ..storage.reading import is_folder, open_regular, read_bytes, reading_archive
from ..utils.errors import one_line

# Suffixes of the files that are read, and Pillow's names of their formats.
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
MAX_FILE_BYTES = 2**28  # bytes of one file
LABELS_FILE = "dataset.json"


class ImageFiles:
    """The files of a data set, by their paths below it, with "/" between folders.

    names: paths of the images, sorted. folders: paths of all folders that are not hidden.
    stamps: for each file, a tuple that changes when the file does (size and modification time, or CRC).
    ValueError if there is no image.
    """

    def __init__(self, path: Path, stamps: dict[str, tuple], folders: set[str]):
        self.path = path
        self.names = sorted(name for name in stamps if _is_image(name))
        self.folders = {name for name in folders if not is_hidden(name)}
        self.stamps = stamps
        if not self.names:
            raise ValueError(f"{path} holds no images ({', '.join(FORMATS)})")

    def read(self, name: str) -> bytes:
        """The bytes of a file; ValueError if it cannot be read, or is larger than MAX_FILE_BYTES."""
        raise NotImplementedError


class _FolderFiles(ImageFiles):
    def __init__(self, path: Path):
        stamps, folders, top = {}, set(), PurePosixPath()
        # The path at which each folder was found first. The folders above the data set are entered too, so
        # that a link that leads up is not followed.
        found = {_identity(folder): top for folder in Path(os.path.realpath(path)).parents}
        starts = [(os.fspath(path), top)]  # grows by the links to folders that are met
        for start, name_of_start in starts:
            for where, below, files in os.walk(start, onerror=_fail):
                relative = name_of_start / Path(where).relative_to(start).as_posix()
                first = found.setdefault(_identity(where), relative)
                if first is not relative:
                    below.clear()
                    if relative.is_relative_to(first):  # a link that leads back up
                        folders.discard(relative.as_posix())
                        continue
                    raise ValueError(f"{path}/{relative} leads to {path}/{first}, which would be read twice")
                below[:] = [name for name in below if not is_hidden(name)]
                folders |= {(relative / name).as_posix() for name in below}
                links = [name for name in sorted(below) if os.path.islink(os.path.join(where, name))]
                starts += [(os.path.join(where, name), relative / name) for name in links]
                for name in files:
                    inside = (relative / name).as_posix()
                    if _is_image(inside) or inside == LABELS_FILE:
                        stamps[inside] = _stamp(os.path.join(where, name))
                    elif "." not in name and not os.path.exists(os.path.join(where, name)):
                        _stamp(os.path.join(where, name))  # raises: a broken link, perhaps to a class folder
        super().__init__(path, stamps, folders)

    def read(self, name: str) -> bytes:
        return read_bytes(os.path.join(self.path, name), MAX_FILE_BYTES)


class _ZipFiles(ImageFiles):
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
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"cannot read {self.path}/{name}: it is larger than {MAX_FILE_BYTES >> 20} MiB")
        return data


@contextlib.contextmanager
def open_files(path: Path) -> Iterator[ImageFiles]:
    """The files of a folder or a zip; ValueError if `path` is neither, or holds no images."""
    if is_folder(path):
        yield _FolderFiles(path)
        return
    if not os.path.lexists(path):
        raise ValueError(f"there is no data set, folder or zip {str(path)!r}")
    with open_regular(path, math.inf) as file:
        try:
            archive = zipfile.ZipFile(file)
        except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, MemoryError) as error:
            raise ValueError(f"{path} is no folder and no zip that can be read: {error}") from error
        with archive:
            yield _ZipFiles(path, archive)


def _fail(error: OSError) -> NoReturn:
    raise ValueError(f"cannot read {error.filename}: {one_line(error)}") from error


def _identity(folder: str | os.PathLike) -> tuple[int, int]:
    """Device and inode of a folder, the same for all paths that lead to it."""
    try:
        status = os.stat(folder)
    except OSError as error:
        _fail(error)
    return status.st_dev, status.st_ino


def _stamp(path: str) -> tuple[int, int]:
    """Size and modification time of a file; ValueError for a broken link, a pipe or a device."""
    try:
        status = os.stat(path)
    except OSError as error:
        _fail(error)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"cannot read {path}: it is no regular file")
    return status.st_size, status.st_mtime_ns


def is_hidden(name: str) -> bool:
    """Whether a path has a part that begins with a dot, or is the __MACOSX that macOS adds to zips."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in FORMATS and not is_hidden(name)
