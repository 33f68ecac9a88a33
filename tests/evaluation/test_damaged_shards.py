"""Shards that were damaged, altered or replaced are made again, and are not evaluated."""

import hashlib
import json
import os
import tracemalloc
from functools import partial

import numpy as np
import pytest

from diffusion.data.npz import load_images
from diffusion.evaluation.shards import report, sample_shards
from diffusion.storage.shard_files import what_is_wrong
from diffusion.utils.ranks import Ranks
from helpers.shards import model_of, shards_of


def damaged(path, damage: str) -> None:
    """Alters a shard in a way that leaves a file which NumPy reads."""
    with np.load(path) as shard:
        arrays = dict(shard)
    images, labels = arrays["images"], arrays["labels"]
    if damage == "no labels":
        del arrays["labels"]
    elif damage == "no digest":
        del arrays["sha256"]
    elif damage == "one more":
        arrays["scores"] = np.zeros(3)
    elif damage == "a flipped pixel":
        images[1, 2, 3, 0] ^= 1
    else:
        name, array = {
            "flipped labels": ("labels", labels[::-1].copy()),
            "other labels": ("labels", labels + 1),
            "labels of another type": ("labels", labels.astype(np.int32)),
            "ids of another type": ("sample_ids", arrays["sample_ids"].astype(np.float64)),
            "zero images": ("images", np.zeros_like(images)),
            "swapped images": ("images", images[::-1].copy()),
            "channels first": ("images", images.transpose(0, 3, 1, 2)),
            "larger images": ("images", images.repeat(2, axis=1)),
            "fewer images": ("images", images[:-1]),
            "images of floats": ("images", images.astype(np.float32)),
            "another digest": ("sha256", np.asarray("0" * 64)),
        }[damage]
        arrays[name] = array
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("flipped labels", "its labels are not those of the run"),
        ("other labels", "its labels are not those of the run"),
        ("labels of another type", "its labels are of another shape or type"),
        ("no labels", "it has no labels"),
        ("ids of another type", "its sample_ids are of another shape or type"),
        ("zero images", "SHA-256"),
        ("swapped images", "SHA-256"),
        ("a flipped pixel", "SHA-256"),
        ("channels first", "its images are of another shape or type"),
        ("larger images", "its images are of another shape or type"),
        ("fewer images", "its images are of another shape or type"),
        ("images of floats", "its images are of another shape or type"),
        ("no digest", "it has no sha256"),
        ("another digest", "SHA-256"),
        ("one more", "other arrays"),
    ],
)
def test_a_shard_that_was_altered_is_made_again(damage, reason, tmp_path):
    make = partial(sample_shards, model_of(10), tmp_path, 6, [3, 1, 4], shard_size=3, steps=2)
    make()
    before = shards_of(tmp_path)
    damaged(tmp_path / "shard-00001.npz", damage)
    done = make()
    assert shards_of(tmp_path) == before
    assert (done["images"], done["kept"]) == (3, 1)
    (told,) = done["remade"]
    assert told.startswith("shard-00001.npz, ")
    assert reason in told
    assert f"made again: {told}" in report(tmp_path, done, Ranks())
    assert make()["remade"] == []


@pytest.mark.parametrize(
    "damage", ["flipped labels", "zero images", "a flipped pixel", "no digest", "one more"]
)
def test_a_shard_that_was_altered_is_not_evaluated(damage, tmp_path):
    sample_shards(model_of(10, channels=1), tmp_path, 6, [3, 1, 4], shard_size=3, steps=2)
    found = load_images(tmp_path)
    assert found.labels.tolist() == [3, 1, 4, 3, 1, 4]
    damaged(tmp_path / "shard-00001.npz", damage)
    with pytest.raises(ValueError, match=r"shard-00001\.npz does not hold what was written, by its SHA-256"):
        load_images(tmp_path)
    (tmp_path / "run.json").unlink()  # arrays of somebody else's have no run
    load_images(tmp_path)


def test_any_flipped_byte_of_a_shard_is_noticed(tmp_path):
    """Bytes that belong to no array, such as the times in a zip, are left out."""
    make = partial(sample_shards, model_of(10), tmp_path, 3, [3, 1, 4], shard_size=3, steps=2)
    make()
    path = tmp_path / "shard-00000.npz"
    whole = path.read_bytes()
    with np.load(path) as shard:
        arrays = dict(shard)
    generator, noticed = np.random.default_rng(0), 0
    settings = json.loads((tmp_path / "run.json").read_text())
    run = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    for _ in range(200):
        altered = bytearray(whole)
        altered[generator.integers(len(whole))] ^= 1 << generator.integers(8)
        path.write_bytes(altered)
        if what_is_wrong(path, (2, 8, 8), range(3), [3, 1, 4], run) is not None:
            noticed += 1
            continue
        with np.load(path) as shard:
            assert all(np.array_equal(shard[name], arrays[name]) for name in arrays)
    assert noticed > 100
    path.write_bytes(whole)
    assert what_is_wrong(path, (2, 8, 8), range(3), [3, 1, 4], run) is None


def test_a_shard_of_another_run_is_made_again(tmp_path):
    """The shard holds other images, with a digest that is right for them."""
    for seed in (0, 1):
        sample_shards(model_of(), tmp_path / str(seed), 2, shard_size=2, steps=2, seed=seed)
    before, path = shards_of(tmp_path / "0"), tmp_path / "0" / "shard-00000.npz"
    path.write_bytes((tmp_path / "1" / "shard-00000.npz").read_bytes())
    assert len(sample_shards(model_of(), tmp_path / "0", 2, shard_size=2, steps=2)["remade"]) == 1
    assert shards_of(tmp_path / "0") == before


def test_many_damaged_shards_are_one_line(tmp_path):
    make = partial(sample_shards, model_of(), tmp_path, 8, shard_size=1, steps=1)
    make()
    for path in tmp_path.glob("shard-*"):
        path.write_bytes(b"")
    (line,) = (line for line in report(tmp_path, make(), Ranks()) if line.startswith("made again"))
    assert line.count("shard-") == 5
    assert line.endswith("; and 3 more")


def test_a_small_file_does_not_become_a_large_array(tmp_path):
    make = partial(sample_shards, model_of(), tmp_path, 1, shard_size=1, steps=1)
    make()
    with np.load(tmp_path / "shard-00000.npz") as shard:
        arrays = dict(shard) | {"images": np.zeros((2**26,), np.uint8)}
    np.savez_compressed(tmp_path / "shard-00000.npz", **arrays)
    tracemalloc.start()
    assert "its images are of another shape" in make()["remade"][0]
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


@pytest.mark.parametrize("damage", [[], 5, None, "text", "no options", "a list", "one more"])
def test_a_run_json_that_was_altered_is_named(damage, tmp_path):
    make = partial(sample_shards, model_of(), tmp_path, 2, steps=2)
    make()
    settings = json.loads((tmp_path / "run.json").read_text())
    expected = r"run\.json is damaged: .*; remove the folder, or choose another$"
    if damage == "no options":
        del settings["options"]
    elif damage == "a list":
        settings = [settings]
    elif damage == "one more":  # the shards' digests would be of another run
        settings["note"], expected = "mine", r"holds images of another note \(mine, not None\)"
    else:
        settings["options"] = damage
    (tmp_path / "run.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=expected) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "target", ["shard-00002.npz", "shard-00001.npz", "nowhere", "folder", "pipe", "/dev/zero"]
)
def test_a_link_in_a_shards_place_is_replaced(target, tmp_path):
    """The link is not followed: the shard that it leads to stays unchanged."""
    make = partial(sample_shards, model_of(channels=1), tmp_path, 3, shard_size=1, steps=2)
    make()
    before = shards_of(tmp_path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    path = tmp_path / "shard-00001.npz"
    path.unlink()
    path.symlink_to(target)
    done = make()
    assert (done["images"], done["kept"]) == (1, 2)
    assert [told.split(",")[0] for told in done["remade"]] == ["shard-00001.npz"]
    assert not path.is_symlink()
    assert shards_of(tmp_path) == before
    assert load_images(tmp_path).images.shape[0] == 3


def test_a_link_to_the_right_shard_is_kept(tmp_path):
    make = partial(sample_shards, model_of(), tmp_path / "out", 3, shard_size=1, steps=2)
    make()
    path = tmp_path / "out" / "shard-00001.npz"
    path.rename(tmp_path / "elsewhere.npz")
    path.symlink_to(tmp_path / "elsewhere.npz")
    assert make()["kept"] == 3
    assert path.is_symlink()


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_in_a_shards_place_is_refused(kind, tmp_path):
    make = partial(sample_shards, model_of(), tmp_path, 3, shard_size=1, steps=2)
    make()
    path = tmp_path / "shard-00001.npz"
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(ValueError, match=r"cannot write .*shard-00001\.npz: it is a "):
        make()
