"""Locks between processes: files that the kernel unlocks when the process that holds them dies."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..utils.errors import one_line
from .reading import read_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment] # mypy knows no name for "a module or None"


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds the lock file `path` within the block and gives True; gives False if another process holds it.

    wait: wait for the other process instead. The file is created if it is missing, contains the process
    number, and is removed at the end. Where the system or the file system has no locks, gives True without
    one. ValueError if the file cannot be created.
    """
    file, held = _take(path, wait)
    try:
        yield held
    finally:
        if file is not None:
            if held:
                path.unlink(missing_ok=True)
            os.close(file)


def holder(path: Path) -> str:
    """The process that holds a lock file: "process 1234", or "another process" if the file does not say."""
    try:
        number = read_text(path, 20).strip()
    except ValueError:
        number = ""
    return f"process {number}" if number.isdecimal() else "another process"


def _take(path: Path, wait: bool) -> tuple[int | None, bool]:
    """The open lock file, None where the system has no locks, and whether the caller may go on."""
    if fcntl is None:
        return None, True
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {one_line(error)}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return file, False
        except OSError:  # a file system without locks
            return file, True
        if _is_at(path, file):
            with contextlib.suppress(OSError):  # on a full disk the lock holds without the number
                os.truncate(file, 0)
                os.write(file, f"{os.getpid()}\n".encode())
            return file, True
        os.close(file)  # the former holder removed the file after it was opened here


def _is_at(path: Path, file: int) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
