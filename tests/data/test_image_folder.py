"""Folders and zips of images: the images, their order, their labels, and refusals."""

import errno
import io
import json
import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.data import load_dataset
from diffusion.data.image_folder import read_images
from helpers.processes import start_python

NAMES = ("cat/1.png", "cat/10.png", "cat/2.png", "dog/b.jpg", "emu/a.webp")


def pixels(seed: int, shape=(6, 5, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, suffix: str, **options) -> bytes:
    file, kind = io.BytesIO(), {"jpg": "JPEG", "webp": "WEBP"}.get(suffix, suffix.upper())
    options |= {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def some_images(names=NAMES) -> dict[str, bytes]:
    return {name: encoded(pixels(seed), name.rpartition(".")[2]) for seed, name in enumerate(names)}


def write(where: Path, files: dict[str, bytes], kind: str) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(where.with_suffix(".zip"), "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return where.with_suffix(".zip")
    where.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        path = where / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return where


both = pytest.mark.parametrize("kind", ["folder", "zip"])


@both
def test_classes_are_folders_and_all_is_in_the_order_of_names(kind, tmp_path):
    files = some_images()
    clutter = {"cat/.hidden.png": b"x", "__MACOSX/cat/1.png": b"x", "cat/notes.txt": b"x", ".git/a.png": b"x"}
    found = read_images(write(tmp_path / "set", files | clutter, kind))
    assert found.classes == ("cat", "dog", "emu")
    assert found.labels.tolist() == [0, 0, 0, 1, 2]
    assert found.labels.dtype == torch.int64
    assert found.images.dtype == torch.uint8
    assert found.images.is_contiguous()
    for image, (name, data) in zip(found.images, files.items(), strict=True):
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), expected, err_msg=name)
        if not name.endswith("jpg"):  # lossless, so Pillow is no judge in its own case
            np.testing.assert_array_equal(expected, pixels(list(files).index(name)))


@both
def test_a_folder_around_the_classes_is_none(kind, tmp_path):
    files = {f"data/train/{name}": data for name, data in some_images().items()}
    assert read_images(write(tmp_path / "set", files, kind)).classes == ("cat", "dog", "emu")
    one = read_images(write(tmp_path / "one", some_images(NAMES[:2]), kind))
    assert one.classes == ("cat",)
    assert one.labels.tolist() == [0, 0]


@both
def test_without_subfolders_there_are_no_labels(kind, tmp_path):
    found = read_images(write(tmp_path / "set", some_images(("b.png", "a.png")), kind))
    assert found.labels is None
    assert found.classes is None
    np.testing.assert_array_equal(found.images[0].permute(1, 2, 0).numpy(), pixels(1))


@both
@pytest.mark.parametrize("labels", [[4, 0], None])
def test_dataset_json_labels_as_edm_writes_it(labels, kind, tmp_path):
    names = ("00000/img00000000.png", "00000/img00000001.png")
    entries = None if labels is None else [list(pair) for pair in zip(names, labels, strict=True)]
    files = some_images(names) | {"dataset.json": json.dumps({"labels": entries}).encode()}
    found = read_images(write(tmp_path / "set", files, kind))
    assert (None if found.labels is None else found.labels.tolist()) == labels
    assert found.classes is None


@both
@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ('{"labels": [["a.png", 1]]}', "no label for b.png"),
        ('{"labels": [["a.png", 1], ["b.png", 2], ["c.png", 3]]}', "c.png, which is not there"),
        ('{"labels": [["a.png", 1.5], ["b.png", 2]]}', "label of a.png .* whole number"),
        ('{"labels": [["a.png", -1], ["b.png", 2]]}', "label of a.png"),
        ('{"labels": [["a.png", [0, 1]], ["b.png", 2]]}', "label of a.png"),
        ('{"labels": [["a.png", 1], ["b.png", 2], ["a.png", 0]]}', "labels a.png more than once"),
        ('{"labels": [1, 2]}', "pairs"),
        ('{"label": []}', "JSON object"),
        ("[]", "JSON object"),
        ("{", "JSON object"),
        ("[" * 100_000, "JSON object"),
    ],
)
def test_a_dataset_json_of_nonsense(listed, expected, kind, tmp_path):
    files = some_images(("a.png", "b.png")) | {"dataset.json": listed.encode()}
    with pytest.raises(ValueError, match=expected) as caught:
        read_images(write(tmp_path / "set", files, kind))
    assert "dataset.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_kinds_of_pixels_and_channels(tmp_path):
    gray, colour = pixels(1, (6, 5)), pixels(2)
    deep = (gray.astype(np.uint16) << 8) + 77
    files = {"1.png": encoded(gray, "png"), "2.png": encoded(deep, "png")}
    found = read_images(write(tmp_path / "gray", files, "folder"))
    np.testing.assert_array_equal(found.images.numpy(), np.stack([gray, gray])[:, None])
    files["3.png"] = encoded(colour, "png")
    found = read_images(write(tmp_path / "mixed", files, "folder"))
    assert found.images.shape == (3, 3, 6, 5)
    np.testing.assert_array_equal(found.images[0].numpy(), np.stack([gray] * 3))
    np.testing.assert_array_equal(found.images[2].permute(1, 2, 0).numpy(), colour)
    luma = read_images(tmp_path / "mixed", channels=1).images[2, 0].numpy()
    expected = colour @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(luma - expected).max() <= 1
    with_alpha = np.dstack([colour, pixels(3, (6, 5))])
    found = read_images(write(tmp_path / "alpha", {"a.png": encoded(with_alpha, "png")}, "folder"))
    np.testing.assert_array_equal(found.images[0].permute(1, 2, 0).numpy(), colour)


def test_size_crops_the_middle_and_scales(tmp_path):
    wide = np.zeros((8, 14, 3), np.uint8)
    wide[:, 3:11] = 200  # the square in the middle
    files = {"a.png": encoded(wide, "png"), "b.png": encoded(np.full((4, 4, 3), 50, np.uint8), "png")}
    found = read_images(write(tmp_path / "set", files, "folder"), size=4)
    assert found.images.shape == (2, 3, 4, 4)
    assert found.images[0].unique().tolist() == [200]
    assert found.images[1].unique().tolist() == [50]


@both
def test_the_cache_holds_the_same_and_notices_changes(kind, tmp_path, monkeypatch):
    path, cache = write(tmp_path / "set", some_images(), kind), tmp_path / "cache"
    plain = read_images(path)
    first = read_images(path, cache=cache)
    (file,) = cache.glob("*.npy")
    monkeypatch.setattr("diffusion.data.decoding.Decoder.fill", None)  # is not needed again
    second = read_images(path, cache=cache)
    for found in (first, second):
        assert torch.equal(found.images, plain.images)
        assert torch.equal(found.labels, plain.labels)
    second.images[0] = 0  # a copy, not the file
    assert torch.equal(read_images(path, cache=cache).images, plain.images)
    monkeypatch.undo()
    whole = file.read_bytes()
    for damage in (whole[:-1], b"", b"garbage", b"\x80\x04cos\nsystem\n(S'exit 1'\ntR."):
        file.write_bytes(damage)
        assert torch.equal(read_images(path, cache=cache).images, plain.images)
        assert file.read_bytes() == whole
    changed = some_images() | {"cat/1.png": encoded(pixels(99), "png")}
    path = write(tmp_path / "set", changed, kind)
    np.testing.assert_array_equal(
        read_images(path, cache=cache).images[0].permute(1, 2, 0).numpy(), pixels(99)
    )
    assert read_images(path, cache=cache, size=3).images.shape[2:] == (3, 3)


def test_processes_share_a_cache(tmp_path):
    path = write(tmp_path / "set", some_images(), "folder")
    script = "import sys; from diffusion.data.image_folder import read_images\n"
    script += "print(int(read_images(sys.argv[1], cache=sys.argv[2]).images.sum()))"
    processes = [start_python(script, str(path), str(tmp_path / "cache")) for _ in range(2)]
    sums = [int(process.communicate(timeout=120)[0]) for process in processes]
    assert sums == [int(read_images(path).images.sum())] * 2
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_a_cache_takes_its_room_before_it_is_written(tmp_path, monkeypatch):
    """Writing to a mapped file on a full disk would kill the process."""
    path, cache = write(tmp_path / "set", some_images(), "folder"), tmp_path / "cache"
    wanted = []

    def full(file, start, size):
        wanted.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"cannot write .*\.npy: No space left on device"):
        read_images(path, cache=cache)
    assert wanted[0] > 5 * 3 * 6 * 5
    assert os.listdir(cache) == []

    def unable(file, start, size):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unable)
    assert len(read_images(path, cache=cache).images) == 5


def test_what_a_killed_process_left_of_a_cache_is_removed(tmp_path):
    path, cache = write(tmp_path / "set", some_images(), "folder"), tmp_path / "cache"
    read_images(path, cache=cache)
    (file,) = cache.glob("*.npy")
    left, other = cache / f".{file.name}.abc.partial.npy", cache / ".another.npy.abc.partial.npy"
    for leftover in (left, other):
        leftover.write_bytes(b"half")
    file.unlink()
    read_images(path, cache=cache)
    assert not left.exists()
    assert other.exists()  # perhaps another process is writing it


def huge_png() -> bytes:
    """Says that it is 60,000 x 60,000 pixels."""
    data = bytearray(encoded(pixels(0), "png"))
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


@both
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cat/2.png": b"\x89PNG\r\n\x1a\nnonsense"}, r"cat/2\.png cannot be decoded"),
        ({"cat/2.png": encoded(pixels(0, (64, 64, 3)), "png")[:-2000]}, r"cat/2\.png"),
        (
            {"cat/2.png": encoded(pixels(1, (7, 5, 3)), "png")},
            r"cat/2\.png is 5 x 7, and cat/1\.png is 5 x 6",
        ),
        ({"cat/2.png": b""}, r"cat/2\.png cannot be decoded"),
        ({"cat/2.png": huge_png()}, r"cat/2\.png (is too large: 60000 x 60000|cannot be decoded)"),
        ({"loose.png": encoded(pixels(1), "png")}, r"loose\.png is in no class folder"),
        ({"ant/": b""}, r"class folder .*ant holds no images"),
    ],
)
def test_what_is_damaged_is_named(files, expected, kind, tmp_path):
    files = {"cat/1.png": encoded(pixels(0), "png"), "dog/1.png": encoded(pixels(1), "png")} | files
    with pytest.raises(ValueError, match=expected) as caught:
        read_images(write(tmp_path / "set", files, kind))
    assert "\n" not in str(caught.value)


def test_links_to_folders_are_followed(tmp_path):
    """Links to other classes, within a class, and to the set itself through a link: no image comes twice."""
    elsewhere = write(tmp_path / "elsewhere", some_images(), "folder")
    path = tmp_path / "set"
    (path / "ant").mkdir(parents=True)
    (path / "ant" / "more").symlink_to(elsewhere / "cat")
    for name in ("dog", "emu"):
        (path / name).symlink_to(Path("..") / "elsewhere" / name)
    (tmp_path / "link").symlink_to("set")
    for where in (path, tmp_path / "link"):
        found = read_images(where)
        assert found.classes == ("ant", "dog", "emu")
        assert found.labels.tolist() == [0, 0, 0, 1, 2]
        assert torch.equal(found.images, read_images(elsewhere).images)


def test_links_that_lead_back_up_are_passed_over(tmp_path):
    path = write(tmp_path / "set", some_images(), "folder")
    expected = read_images(path)
    (path / "cat" / "up").symlink_to(path)
    (path / "cat" / "again").symlink_to(".")
    (path / "dog" / "out").symlink_to(tmp_path)
    (path / "self").symlink_to(path)
    found = read_images(path)
    assert found.classes == expected.classes
    assert torch.equal(found.images, expected.images)


def test_links_that_would_be_read_twice_or_lead_nowhere(tmp_path):
    path = write(tmp_path / "set", some_images(), "folder")
    (path / "fox").symlink_to("cat")
    with pytest.raises(ValueError, match=r"set/fox leads to .*set/cat, which would be read twice"):
        read_images(path)
    (path / "fox").unlink()
    (path / "fox").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"cannot read .*set/fox: No such file"):
        read_images(path)


@pytest.mark.thinned
@both
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(orientation, suffix, kind, tmp_path):
    """The positions of the first stored row and column follow the table of the EXIF standard."""
    row, column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    stored = np.zeros((16, 24), np.uint8)
    stored[:8], stored[8:, :8] = 200, 90  # the first rows, and then the first columns
    exif = Image.Exif()
    exif[0x0112] = orientation
    files = {f"a.{suffix}": encoded(stored, suffix, exif=exif)}
    ((image,),) = read_images(write(tmp_path / "set", files, kind), channels=1).images
    shown = image.numpy().astype(int)
    assert shown.shape == ((16, 24) if row in ("top", "bottom") else (24, 16))

    def at(side: str, other: str) -> int:
        """The pixel in a corner, two pixels away from both of its sides."""
        y = {"top": 2, "bottom": -3}
        return shown[y[side], {"left": 2, "right": -3}[other]] if side in y else at(other, side)

    opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    for pixel, expected in (
        (at(row, column), 200),
        (at(row, opposite[column]), 200),
        (at(opposite[row], column), 90),
        (at(opposite[row], opposite[column]), 0),
    ):
        assert abs(pixel - expected) <= 8  # JPEG's loss


def test_sizes_are_those_of_turned_images(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "a.png": encoded(pixels(0, (4, 6, 3)), "png", exif=exif),
        "b.png": encoded(pixels(1, (6, 4, 3)), "png"),
    }
    found = read_images(write(tmp_path / "set", files, "folder"))
    assert found.images.shape == (2, 3, 6, 4)
    np.testing.assert_array_equal(
        found.images[0].permute(1, 2, 0).numpy(), np.rot90(pixels(0, (4, 6, 3)), -1)
    )
    files["c.png"] = encoded(pixels(2, (6, 4, 3)), "png", exif=exif)
    with pytest.raises(ValueError, match=r"c\.png is 6 x 4, and a\.png is 4 x 6"):
        read_images(write(tmp_path / "set", files, "folder"))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0", b"x"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_turns_nothing(exif, tmp_path):
    files = {"a.jpg": encoded(pixels(0), "jpg", exif=exif)}
    expected = np.asarray(Image.open(io.BytesIO(files["a.jpg"])).convert("RGB"))
    found = read_images(write(tmp_path / "set", files, "folder"))
    np.testing.assert_array_equal(found.images[0].permute(1, 2, 0).numpy(), expected)


def png_with(chunk: bytes, data: bytes, last: bool) -> bytes:
    """A PNG with one more chunk, before or after its pixels."""
    whole = encoded(pixels(0), "png")
    at = whole.index(b"IEND" if last else b"IDAT") - 4
    crc = zlib.crc32(chunk + data).to_bytes(4, "big")
    return whole[:at] + len(data).to_bytes(4, "big") + chunk + data + crc + whole[at:]


@both
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("chunk", "data"),
    [
        (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**24))),
        (b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2**24))),
    ],
)
def test_a_text_bomb_is_named(chunk, data, last, kind, tmp_path):
    files = {"cat/1.png": png_with(chunk, data, last), "dog/1.png": encoded(pixels(1), "png")}
    with pytest.raises(
        ValueError, match=r"cat/1\.png cannot be decoded: Decompressed data too large"
    ) as caught:
        read_images(write(tmp_path / "set", files, kind))
    assert "\n" not in str(caught.value)


def test_names_that_are_no_utf8(tmp_path):
    name = os.fsdecode(b"c\xe9t")
    path = tmp_path / os.fsdecode(b"s\xe9t")
    try:
        (path / name).mkdir(parents=True)
    except OSError:
        pytest.skip("this file system takes names of UTF-8 only")
    (path / name / os.fsdecode(b"\xff.png")).write_bytes(encoded(pixels(0), "png"))
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        found = read_images(path, cache=cache)
        assert found.classes == (name,)
        np.testing.assert_array_equal(found.images[0].permute(1, 2, 0).numpy(), pixels(0))
    (path / name / os.fsdecode(b"\xfe.png")).write_bytes(b"")
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        read_images(path)
    assert os.fsdecode(b"\xfe.png") in str(caught.value)


def test_what_is_no_regular_file(tmp_path):
    """A pipe would be waited for without end."""
    path = write(tmp_path / "set", some_images(), "folder")
    (path / "cat" / ".#notes").symlink_to("nobody@nowhere")  # as editors leave them
    (path / "cat" / "x.png").mkdir()
    assert len(read_images(path).images) == 5
    broken = path / "cat" / "y.png"
    broken.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(ValueError, match=r"cannot read .*cat/y\.png: No such file"):
        read_images(path)
    broken.unlink()
    os.mkfifo(path / "dog" / "pipe.png")
    with pytest.raises(ValueError, match=r"dog/pipe\.png: it is no regular file"):
        read_images(path)


def test_what_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="there is no data set, folder or zip"):
        read_images(tmp_path / "none")
    (tmp_path / "text").write_text("no zip")
    with pytest.raises(ValueError, match="no folder and no zip"):
        read_images(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        read_images(tmp_path / "empty")
    with pytest.raises(ValueError, match="1 or 3 channels"):
        read_images(tmp_path, channels=4)
    with pytest.raises(ValueError, match="size"):
        read_images(tmp_path, size=0)


def test_damaged_zips(tmp_path):
    path = write(tmp_path / "set", some_images(), "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no zip that can be read"):
        read_images(path)
    middle = bytearray(whole)
    middle[whole.index(b"IDAT") + 8] ^= 0xFF  # stored as it is, so the CRC does not fit any more
    path.write_bytes(bytes(middle))
    with pytest.raises(ValueError, match=r"cat/1\.png: Bad CRC"):
        read_images(path)
    encrypted = bytearray(whole)
    encrypted[whole.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(encrypted))
    with pytest.raises(ValueError, match=r"cat/1\.png is encrypted"):
        read_images(path)


def test_files_without_end_are_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusion.data.image_files.MAX_FILE_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(10**6))
    with pytest.raises(ValueError, match=r"a\.png: it is larger"):
        read_images(tmp_path / "bomb.zip")


def test_more_images_than_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "set", some_images(), "folder")
    monkeypatch.setattr("diffusion.utils.memory.total_memory", lambda device: 100)
    with pytest.raises(ValueError, match=r"5 images of .*set"):
        read_images(path)


def test_load_dataset_reads_folders_and_asks_for_the_named(tmp_path):
    path = write(tmp_path / "set", some_images(), "folder")
    assert torch.equal(load_dataset(path, channels=3).images, read_images(path).images)
    with pytest.raises(ValueError, match="there is no data set, folder or zip ''"):
        load_dataset("")
    with pytest.raises(ValueError, match="cifar10 needs --data-dir"):
        load_dataset("cifar10")
