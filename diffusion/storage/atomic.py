"""Files that are written whole or not at all: made beside their target, then renamed over it."""

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ..utils.errors import one_line

LEFTOVER = ".partial"  # in the names of files that are not yet whole


@contextlib.contextmanager
def replacing(*targets: str | os.PathLike) -> Iterator[list[Path]]:
    """Gives one temporary path for each target; all are renamed onto their targets if the block succeeds.

    Missing parent folders are made; links are followed. If the block raises, the targets are unchanged and
    the temporary files are deleted. Files and folders are synced, so that the files survive a power failure.
    ValueError, naming the target, if something other than a file has its name, or its folder cannot be
    written.
    """
    check_writable(*targets)
    temporary = []
    try:
        files = [Path(os.path.realpath(target)) for target in targets]
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.append(_temporary(file.parent, file.name))
        yield temporary
        for path in temporary:
            _sync(path)
            os.chmod(path, 0o666 & ~_umask())
        for path, file in zip(temporary, files, strict=True):
            os.replace(path, file)
        for folder in {file.parent for file in files}:
            with contextlib.suppress(OSError):  # some systems cannot sync a folder
                _sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors raises its own when a disk is full
        raise ValueError(f"cannot write {targets[0]}: {one_line(error)}") from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """Deletes temporary files that a killed writer left in a folder, or only those of the file `name`.

    Not safe while another process writes there.
    """
    patterns = [f".{'*' if name is None else f'{glob.escape(name)}.*'}{LEFTOVER}.*"]
    if name is None:
        patterns.append(".tmp" + 6 * "[0-9A-Za-z]")  # temporary files of safetensors 0.8
    for path in (path for pattern in patterns for path in Path(folder).glob(pattern)):
        with contextlib.suppress(OSError):
            path.unlink()


def check_writable(*targets: str | os.PathLike) -> None:
    """ValueError if one of these files could not be created or replaced; leaves nothing behind.

    Called before long work, so that an hour of sampling does not end in an error about a folder.
    """
    for target in map(Path, targets):
        if "\0" in str(target):
            raise ValueError(f"cannot write {str(target)!r}: no file name holds a null character")
        try:
            file = Path(os.path.realpath(target))
            if file.is_dir():
                raise ValueError(f"cannot write {target}: it is a folder, not a file")
            if file.exists() and not file.is_file():
                raise ValueError(f"cannot write {target}: it is a device or the like, not a file")
            there = next(folder for folder in file.parents if os.path.lexists(folder))
            if there == file.parent:
                _temporary(there, file.name).unlink(missing_ok=True)
            else:  # tried in a folder of its own: other processes may be making the same folders
                with tempfile.TemporaryDirectory(dir=there, prefix=".", suffix=LEFTOVER) as scratch:
                    folder = Path(scratch, file.parent.relative_to(there))
                    folder.mkdir(parents=True)
                    _temporary(folder, file.name)
        except OSError as error:
            raise ValueError(f"cannot write {target}: {one_line(error)}") from error


def _temporary(folder: Path, name: str) -> Path:
    """Makes an empty temporary file beside the file of this name."""
    handle, path = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=LEFTOVER + Path(name).suffix)
    os.close(handle)
    return Path(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
