"""Checks before writing: what they refuse, and that they disturb nobody."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from diffusion.files import check_writable


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
        ("gone/a", "No such file or directory"),  # a link to nowhere
        ("gone/new/a", "No such file or directory"),
        ("n" * 300 + "/a", "File name too long"),
        ("new/" + "n" * 300 + "/a", "File name too long"),
        ("a\0b", "null character"),
    ],
)
def test_what_cannot_be_written_is_named(name, said, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="cannot write .*" + said):
        check_writable(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before
