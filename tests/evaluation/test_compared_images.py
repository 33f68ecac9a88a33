"""Sources of the images that are compared: arrays, folders and zips."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion.cli import main
from diffusion.data.npz import load_images
from diffusion.evaluation.shards import sample_shards
from diffusion.storage.images import save_npz
from helpers.models import make_model

pytest.importorskip("torch_fidelity", reason="the metrics are torch-fidelity's", exc_type=ImportError)
from helpers.image_sets import images


def test_sources_of_images(tmp_path):
    pixels = images(0, 5).images
    x = pixels.float() / 127.5 - 1
    save_npz(x, tmp_path / "a.npz", [3, 1, 4, 1, 5])
    found = load_images(tmp_path / "a.npz")
    assert torch.equal(found.images, pixels)
    assert found.labels.tolist() == [3, 1, 4, 1, 5]
    np.savez(tmp_path / "b.npz", arr_0=pixels.permute(0, 2, 3, 1).numpy())
    assert torch.equal(load_images(tmp_path / "b.npz").images, pixels)
    for k in range(2):
        data = io.BytesIO()
        Image.fromarray(pixels[k, 0].numpy()).save(data, "PNG")
        with zipfile.ZipFile(tmp_path / "c.zip", "a") as archive:
            archive.writestr(f"{k}.png", data.getvalue())
    assert torch.equal(load_images(tmp_path / "c.zip").images, pixels[:2])
    sample_shards(make_model(channels=3), tmp_path / "d", 5, steps=2, shard_size=3)
    assert load_images(tmp_path / "d").images.shape == (5, 3, 8, 8)
    (tmp_path / "d" / "shard-00001.npz").unlink()
    with pytest.raises(ValueError, match=r"d holds 3 images of 5; finish sampling first"):
        load_images(tmp_path / "d")


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint8, np.int16, ">i4"])
def test_labels_of_any_integers(dtype, tmp_path):
    pixels = images(0, 3).images.permute(0, 2, 3, 1).numpy()
    labels = np.array([7, 0, 9], dtype)
    np.savez(tmp_path / "a.npz", pixels, labels)  # as guided-diffusion's scripts do
    np.savez(tmp_path / "b.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "c.npz", images=pixels, arr_1=labels)
    for name in ("a.npz", "b.npz"):
        found = load_images(tmp_path / name)
        assert found.labels.dtype == torch.int64
        assert found.labels.tolist() == [7, 0, 9]
    assert load_images(tmp_path / "c.npz").labels is None


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array([1, 2**63, 3], np.uint64), r"must be whole numbers in 0..2\^31-1, not 9223372036854775808"),
        (np.array([1, -1, 3]), r"must be whole numbers in 0..2\^31-1, not -1"),
        (np.array([1, 2**31, 3]), r"must be whole numbers in 0..2\^31-1, not 2147483648"),
        (np.array([True, False, True]), r"must be integers \[3\], not bool"),
        (np.array([0.0, 1.0, 2.0]), r"must be integers \[3\], not float64"),
        (np.array([[0], [1], [2]]), r"must be integers \[3\], not int64 \[3, 1\]"),
    ],
)
def test_labels_that_are_none(labels, expected, tmp_path):
    pixels = images(0, 3).images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "a.npz", pixels, labels)
    with pytest.raises(ValueError, match=r"labels in .*a\.npz " + expected):
        load_images(tmp_path / "a.npz")


def bad_npz(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "text":
        return b"no array"
    if kind == "pickle":
        return pickle.dumps([1, 2])
    arrays = {
        "other": {"pictures": np.zeros((3, 4, 4, 1), np.uint8)},
        "floats": {"images": np.zeros((3, 4, 4, 1), np.float32)},
        "flat": {"images": np.zeros((3, 16), np.uint8)},
        "one": {"images": np.zeros((1, 4, 4, 1), np.uint8)},
        "channels": {"images": np.zeros((3, 4, 4, 4), np.uint8)},
        "labels": {"images": np.zeros((3, 4, 4, 1), np.uint8), "labels": np.zeros(2, np.int64)},
        "objects": {"images": np.array([{}, {}], dtype=object)},
        "truncated": {"images": np.random.default_rng(0).integers(0, 9, (30, 9, 9, 1), dtype=np.uint8)},
    }[kind]
    np.savez_compressed(file, allow_pickle=True, **arrays)
    return file.getvalue()[:-300] if kind == "truncated" else file.getvalue()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("text", "cannot read"),
        ("pickle", "cannot read"),
        ("other", "no array `images` or `arr_0`"),
        ("floats", "must be uint8"),
        ("flat", "must be uint8"),
        ("channels", "1 or 3"),
        ("one", "holds 1 image;"),
        ("labels", "labels in .* must be integers"),
        ("objects", "cannot read"),
        ("truncated", "cannot read"),
    ],
)
def test_arrays_that_are_no_images(kind, expected, tmp_path, capsys):
    path = tmp_path / "a.npz"
    path.write_bytes(bad_npz(kind))
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--samples", str(path), "--reference", str(path), "--features", "classifier"])
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert "a.npz" in lines[0]
    with pytest.raises(ValueError, match=expected):
        load_images(path)


def test_too_large_arrays(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((100, 64, 64, 3), np.uint8))
    monkeypatch.setattr("diffusion.data.npz.MAX_BYTES", 10**5)
    with pytest.raises(ValueError, match=r"a\.npz: its array images takes"):
        load_images(tmp_path / "a.npz")
