"""Locks: one holder at a time, whoever dies, and no lock file left behind."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from diffusion.storage.locks import holder, locked
from helpers.processes import start_python

fcntl = pytest.importorskip("fcntl", reason="the system has no such locks", exc_type=ImportError)


def test_one_holder_at_a_time(tmp_path):
    path = tmp_path / "new" / ".lock"
    with locked(path) as first:
        assert first
        assert holder(path) == f"process {os.getpid()}"
        with locked(path) as second:
            assert not second
        with locked(path) as third:  # the second one removed nothing
            assert not third
    assert os.listdir(path.parent) == []
    with locked(path) as again:
        assert again


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    path = tmp_path / ".lock"
    script = "import sys; from pathlib import Path\n"
    script += f"from diffusion.storage.locks import locked\nwith locked(Path({str(path)!r})):\n"
    script += "    print('held', flush=True); sys.stdin.readline()"
    process = start_python(script)
    try:
        assert process.stdout.readline() == "held\n"
        with locked(path) as free:
            assert not free
            assert holder(path) == f"process {process.pid}"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert path.exists()
    with locked(path) as free:
        assert free
    assert not path.exists()


def test_those_that_wait_never_hold_it_together(tmp_path):
    """A holder removes the file; who waited for the removed file takes the new one in turn."""
    inside = []

    def enter(_):
        with locked(tmp_path / ".lock", wait=True) as held:
            assert held
            inside.append(1)
            assert len(inside) == 1
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(400)))


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """The former holder removes the file after another process opened it, and before that one locks it."""
    path, flock, calls = tmp_path / ".lock", fcntl.flock, []

    def after_a_removal(file, how):
        if not calls:
            path.unlink()
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr("fcntl.flock", after_a_removal)
    with locked(path) as held:
        assert held
        assert len(calls) == 2
        with locked(path) as second:
            assert not second


def test_a_file_system_without_locks_gives_the_lock_to_all(tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unsupported)
    with locked(tmp_path / ".lock") as first, locked(tmp_path / ".lock") as second:
        assert first
        assert second


def test_a_lock_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*\.lock"), locked(tmp_path / "file" / ".lock"):
        pass


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"-3", b"1" * 5000])
def test_a_lock_file_that_says_nothing(content, tmp_path):
    Path(tmp_path / ".lock").write_bytes(content)
    assert holder(tmp_path / ".lock") == "another process"
