"""Checks before writing: refusals, and no effect on other files or processes."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from diffusion.storage.atomic import check_writable, remove_leftovers, replacing
from helpers.processes import start_python


def test_processes_that_begin_together_do_not_remove_each_others_folders(tmp_path):
    together = Barrier(8, timeout=10)

    def begin(k: int) -> None:
        for attempt in range(100):
            folder = tmp_path / f"new-{attempt}" / "out"
            together.wait()
            check_writable(folder / "run.json")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / str(k)).write_text("kept")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(begin, range(8)))
    for attempt in range(100):
        assert sorted(os.listdir(tmp_path / f"new-{attempt}" / "out")) == list("01234567")


@pytest.mark.parametrize("name", ["a", "new/a", "new/newer/a", "new/../a", "new/../../a", "there/a"])
def test_nothing_is_left_behind(name, tmp_path):
    (tmp_path / "inner" / "there").mkdir(parents=True)
    check_writable(tmp_path / "inner" / name)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == [
        Path("inner"),
        Path("inner/there"),
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("there", "it is a folder"),
        ("file/a", "Not a directory"),
        ("file/new/a", "Not a directory"),
        ("new/../file/a", "Not a directory"),
        ("round/a", "symbolic links"),
        ("pipe", "a device or the like"),
        ("to-pipe", "a device or the like"),
        ("n" * 240, "File name too long"),  # with the suffix of the temporary file
        ("n" * 300 + "/a", "File name too long"),
        ("new/" + "n" * 300 + "/a", "File name too long"),
        ("a\0b", "null character"),
    ],
)
def test_what_cannot_be_written_is_named(name, said, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="cannot write .*" + said):
        check_writable(tmp_path / name)
    with pytest.raises(ValueError, match="cannot write .*" + said), replacing(tmp_path / name):
        raise AssertionError("nothing is begun that cannot be ended")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "pipe").is_fifo()


def test_files_and_their_folders_are_synced(tmp_path, monkeypatch):
    """All files are synced before the first is renamed, and each folder after it."""
    done, fsync, replace = [], os.fsync, os.replace

    def note_sync(handle):
        done.append(("sync", os.fstat(handle).st_ino))
        fsync(handle)

    def note_rename(source, target):
        done.append(("rename", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    targets = [tmp_path / "a", tmp_path / "new" / "b"]
    with replacing(*targets) as temporary:
        for path in temporary:
            path.write_text("x")
    files = [target.stat().st_ino for target in targets]
    assert done[:4] == [(what, file) for what in ("sync", "rename") for file in files]
    assert {entry for entry in done[4:]} == {("sync", target.parent.stat().st_ino) for target in targets}


def test_what_killed_processes_left_is_removed(tmp_path):
    """Ours, and that of safetensors, killed while it writes in a process of its own; nothing else."""
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "save_file({'a': torch.zeros(2**28, dtype=torch.uint8)}, sys.argv[1])"
    )
    process = start_python(code, str(tmp_path / "a.safetensors"))
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    (tmp_path / "a.safetensors").unlink(missing_ok=True)  # other releases write there
    kept = (".tmp", ".tmpx", ".tmp1234567", ".tmp12345.x", "tmp123456", "state.safetensors")
    for name in (*kept, ".a.x1.partial.png", ".b.x2.partial.png"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path, "a")
    assert not (tmp_path / ".a.x1.partial.png").exists()
    assert (tmp_path / ".b.x2.partial.png").exists()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(kept)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("a", "a"),
        ("new/newer/a", "new/newer/a"),
        ("new/../a", "a"),
        ("link", "there/file"),  # the target of the link is written
        ("gone", "there/nothing"),
        ("lost/a", "there/lost/a"),
        ("inner/../new/a", "there/new/a"),  # the folder above is that of the link's target
        ("n" * 230, "n" * 230),
    ],
)
def test_what_passes_the_check_is_written(name, where, tmp_path):
    (tmp_path / "there" / "inner").mkdir(parents=True)
    (tmp_path / "there" / "file").write_text("old")
    for link, to in (("link", "file"), ("gone", "nothing"), ("lost", "lost"), ("inner", "inner")):
        (tmp_path / link).symlink_to(tmp_path / "there" / to)
    links = {path for path in tmp_path.iterdir() if path.is_symlink()}
    check_writable(tmp_path / name)
    with replacing(tmp_path / name) as (temporary,):
        temporary.write_text("new")
    assert (tmp_path / where).read_text() == "new"
    assert {path for path in tmp_path.iterdir() if path.is_symlink()} == links
    assert not [path for path in tmp_path.rglob(".*") if path.name.startswith(".")]
