"""Files that are written whole or not at all: made beside their target, then renamed over it."""

import contextlib
import glob
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

LEFTOVER = ".partial"  # in the names of files that are not yet whole


@contextlib.contextmanager
def replacing(*targets: str | os.PathLike) -> Iterator[list[Path]]:
    """Gives one temporary path for each target; all are renamed onto their targets if the block succeeds.

    Missing parent folders are made. If the block raises, nothing is left behind and the targets are as
    they were. ValueError, naming the target, if its folder cannot be written.
    """
    targets = [Path(target) for target in targets]
    check_writable(*targets)
    temporary = []
    try:
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(
                dir=target.parent, prefix=f".{target.name}.", suffix=LEFTOVER + target.suffix
            )
            os.close(handle)
            temporary.append(Path(name))
        yield temporary
        for path, target in zip(temporary, targets, strict=True):
            _sync(path)
            os.chmod(path, 0o666 & ~_umask())
            os.replace(path, target)
    except (OSError, SafetensorError) as error:  # safetensors' own, when a disk is full
        raise ValueError(f"cannot write {targets[0]}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """Removes what a process left that was killed while it wrote into a folder, or its file of this name.

    No other may be writing.
    """
    prefix = ".*" if name is None else f".{glob.escape(name)}.*"
    for path in Path(folder).glob(f"{prefix}{LEFTOVER}.*"):
        with contextlib.suppress(OSError):
            path.unlink()


def sha256(path: str | os.PathLike) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def check_writable(*targets: str | os.PathLike) -> None:
    """ValueError if one of these files could not be created or replaced; leaves nothing behind.

    Called before long work, so that an hour of sampling does not end in an error about a folder.
    """
    for target in map(Path, targets):
        if "\0" in str(target):
            raise ValueError(f"cannot write {str(target)!r}: no file name holds a null character")
        try:
            if target.is_dir():
                raise ValueError(f"cannot write {target}: it is a folder, not a file")
            there = next(folder for folder in target.parents if os.path.lexists(folder))
            if there == target.parent:
                with tempfile.TemporaryFile(dir=there):
                    pass
            else:  # tried elsewhere: other processes may be making, and filling, the same folders
                with tempfile.TemporaryDirectory(dir=there, prefix=".", suffix=LEFTOVER) as scratch:
                    inside = os.path.normpath("/" / target.parent.relative_to(there))
                    folder = Path(scratch, inside.lstrip("/"))
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / "file").touch()
        except OSError as error:
            raise ValueError(f"cannot write {target}: {error.strerror or error}") from error


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
