"""Labels of data sets, whether they are in the items or beside them; and runs on data sets that resume."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

import diffusion
from diffusion.data.datasets import _array, read_dataset
from diffusion.training.state import read_state
from helpers.training import PLAIN

UNET = PLAIN.unet | {"in_channels": 3, "out_channels": 3, "num_classes": 2}
RECIPE = diffusion.Recipe(
    unet=UNET, steps=1, batch_size=4, warmup_steps=0, more_ema_decays=(), ema_decay=0.5, horizontal_flip=False
)
QUIET = {"progress": False, "device": "cpu", "autocast": None}
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)


class Items(Dataset):
    """Images with labels of a function of their number, and any attributes."""

    def __init__(self, label=None, image=None, **attributes):
        self.label, self.image = label or (lambda k: k % 2), image or (lambda k: Image.fromarray(PIXELS[k]))
        self.__dict__.update(attributes)

    def __len__(self):
        return 20

    def __getitem__(self, k):
        return self.image(k), self.label(k)


def read(data, channels=3, **options):
    return read_dataset(data, lambda found: (channels, (8, 8)), **options)


@pytest.fixture(autouse=True)
def no_grids(monkeypatch):
    """Grids take longer than the runs here."""
    monkeypatch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("attributes", [{}, {"target_transform": lambda label: label}])
def test_labels_are_those_of_the_items(stream, attributes):
    """The attribute `targets` holds them before a target_transform, and a subclass may change them, too."""
    data = Items(targets=[10 + k % 2 for k in range(20)], classes=["cat", "dog"], **attributes)
    for some in (data, Subset(data, range(1, 13))):
        found = read(some, stream=stream)
        assert found.labels.tolist() == [some[k][1] for k in range(len(some))]
        assert found.classes is None
        assert found.remark == ", labels of the items without the data set's class names"
    agreeing = Items(targets=[k % 2 for k in range(20)], classes=["cat", "dog"], **attributes)
    assert read(agreeing, stream=stream).classes == ("cat", "dog")


def test_labels_beside_the_items_are_taken_without_reading_all():
    asked = []
    data = Items(lambda k: asked.append(k) or k % 2, targets=[k % 2 for k in range(20)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion.data.datasets.SURVEYED", 5)
        assert read(data, stream=True).labels.tolist() == [k % 2 for k in range(20)]
    assert len(asked) <= 6


@pytest.mark.parametrize("stream", [False, True])
def test_names_as_labels_become_classes(stream):
    found = read(Items(lambda k: ["dog", "cat"][k % 2]), stream=stream)
    assert found.classes == ("cat", "dog")
    assert found.labels.tolist() == [1 - k % 2 for k in range(20)]
    named = read(Items(lambda k: ["dog", "cat"][k % 2], classes=["dog", "cat", "eel"]), stream=stream)
    assert named.classes == ("dog", "cat", "eel")
    assert named.labels.tolist() == [k % 2 for k in range(20)]


@pytest.mark.parametrize("value", [np.int64(1), torch.tensor(1), np.array([1], np.uint8), True, 1])
def test_whole_numbers_of_any_kind(value):
    assert read(Items(lambda k: value)).labels.tolist() == [1] * 20


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (
            lambda k: 0.7 + k % 2,
            "label of item 0 of the data set must be a whole number from 0 on, or",
        ),
        (lambda k: np.eye(3)[k % 3], r"label of item 0 .* not array\("),
        (lambda k: [1] * (1 + k % 2), "label of item 0 "),
        (lambda k: -2, "label of item 0 .* not -2"),
        (lambda k: None if k == 3 else 1, "item 3 of the data set has no label, and others have one"),
        (lambda k: ["a", 1][k % 2], "some labels of the data set are names, and some are numbers"),
    ],
)
def test_other_labels_are_refused(label, expected):
    with pytest.raises(ValueError, match=expected):
        read(Items(label))


def test_items_that_cannot_be_read_are_named():
    def broken(k):
        if k == 7:
            raise OSError("truncated\nfile")
        return Image.fromarray(PIXELS[k])

    with pytest.raises(ValueError, match=r"^item 7 of the data set cannot be read: OSError: truncated file$"):
        read(Items(image=broken))
    floating = Items(image=lambda k: Image.new("F", (8, 8)))
    with pytest.raises(ValueError, match=r"^image 0 of the data set cannot be decoded: its pixels are float"):
        read(floating)
    with pytest.raises(ValueError, match="stream must be True, False or None, not 'no'"):
        read(Items(), stream="no")
    with pytest.raises(ValueError, match="workers must be"):
        read(Items(), workers=-1)


def test_colour_is_not_lost_without_a_word(monkeypatch):
    monkeypatch.setattr("diffusion.data.datasets.SURVEYED", 2)
    mixed = Items(image=lambda k: Image.fromarray(PIXELS[k]).convert("RGB" if k == 5 else "L"))
    with pytest.raises(ValueError, match=r"image 5 of the data set has colour .* read first are grey"):
        read(mixed, channels=1)
    assert read(Items(), channels=1).remark == ", colour is dropped"


def test_pixels_of_grey_images_are_writable():
    """PyTorch warns of others, once in a process."""
    array = _array(Image.fromarray(PIXELS[3, :, :, 0]), 1, (8, 8), 3)
    assert array.flags.writeable
    assert np.array_equal(array[0], PIXELS[3, :, :, 0])


def test_unused_columns_are_told():
    rows = [{"image": Image.fromarray(PIXELS[k]), "breed": k % 2} for k in range(4)]
    found = read(rows)
    assert found.labels is None
    assert found.remark == ", unused columns: breed"


@pytest.mark.parametrize("random", [False, True])
def test_a_run_resumes_in_memory_or_not_and_with_random_transforms(random, tmp_path):
    def turned(k):
        pixels = PIXELS[k] if not random or torch.rand(()) < 0.5 else PIXELS[k][:, ::-1]
        return Image.fromarray(np.ascontiguousarray(pixels))

    data, out = Items(image=turned), tmp_path / "run"
    diffusion.train(data, out, recipe=RECIPE, stream=False, **QUIET)
    for stream in (True, False):
        assert diffusion.train(data, out, resume=True, stream=stream, **QUIET).metadata is not None
    with pytest.raises(ValueError, match="other images or labels"):
        diffusion.train(Items(lambda k: 1 - k % 2, turned), out, resume=True, **QUIET)


def make_pets(folder, names=("cat", "dog")):
    for name, offset in zip(names, (0, 1), strict=True):
        (folder / name).mkdir(parents=True)
        for k in range(10):
            Image.fromarray(PIXELS[2 * k + offset]).save(folder / name / f"{k}.png")
    return folder


def trained_labels(monkeypatch) -> list:
    """Grows by the trainer of each run from here on."""
    seen = []
    monkeypatch.setattr(
        "diffusion.training.from_data.loop.train", lambda trainer, *rest, **options: seen.append(trainer)
    )
    return seen


def test_class_names_are_another_order_of_those_of_a_folder(tmp_path, monkeypatch):
    seen, pets = trained_labels(monkeypatch), make_pets(tmp_path / "pets")
    options = {"recipe": RECIPE, "hold_out": 0, **QUIET}
    diffusion.train(pets, tmp_path / "run", class_names=["dog", "cat"], **options)
    assert seen[-1].labels.tolist() == [1] * 10 + [0] * 10
    assert seen[-1].model.class_names == ("dog", "cat")
    with pytest.raises(ValueError, match="has a class cat, which class_names lacks"):
        diffusion.train(pets, tmp_path / "run", class_names=["dogs", "cats"], **options)
    with pytest.raises(ValueError, match="class_names must be a list of different names, not 7"):
        diffusion.train(pets, tmp_path / "run", class_names=7, **options)


def test_class_names_give_the_number_of_classes_and_grey_is_not_mirrored(tmp_path, monkeypatch, capsys):
    seen, labels = trained_labels(monkeypatch), [0, 2] * 10
    monkeypatch.setattr("diffusion.training.from_data.outlook", lambda *arguments: "")
    options = {**QUIET, "recipe": "small-32", "steps": 1, "more_ema_decays": ()}
    unet = diffusion.training.recipe.load_recipe("small-32").unet | UNET | {"num_classes": 10}
    small = diffusion.Recipe(unet=unet, horizontal_flip=True)
    monkeypatch.setattr("diffusion.training.from_data.load_recipe", lambda name: small)
    options["progress"] = True
    diffusion.train(PIXELS, tmp_path / "run", labels, class_names=["a", "b", "c", "d"], **options)
    assert seen[-1].recipe.unet["num_classes"] == 4
    assert seen[-1].recipe.horizontal_flip
    assert "4 classes: a, b, c, d; no images of b, d; " in capsys.readouterr().err
    diffusion.train(PIXELS[..., :1], tmp_path / "run", labels, **options)
    assert seen[-1].recipe.unet["num_classes"] == 3
    assert not seen[-1].recipe.horizontal_flip
    assert "3 classes; no images of 1; " in capsys.readouterr().err


def test_a_resumed_run_maps_labels_by_name_and_holds_out_the_same(tmp_path, monkeypatch):
    pets, out = make_pets(tmp_path / "pets"), tmp_path / "run"
    diffusion.train(pets, out, recipe=RECIPE, hold_out=5, class_names=["dog", "cat"], **QUIET)
    command = read_state(out / "state.safetensors")["command"]
    assert command.items() >= {"hold_out": 5, "hold_out_seed": 0}.items()
    seen = trained_labels(monkeypatch)
    diffusion.train(pets, out, resume=True, **QUIET)
    diffusion.train(pets, out, resume=True, accept_changes=True, seed=7, **QUIET)
    for trainer in seen:
        assert trainer.model.class_names == ("dog", "cat")
        assert trainer.labels.tolist() == seen[0].labels.tolist()
        assert torch.equal(trainer.images.indices, seen[0].images.indices)
    assert seen[0].labels[0] == 1
    (pets / "dog").rename(pets / "eel")
    with pytest.raises(ValueError, match=r"has a class eel, which the run in .*run lacks"):
        diffusion.train(pets, out, resume=True, **QUIET)


def test_a_resumed_run_keeps_the_options_of_the_command_line(tmp_path, monkeypatch):
    pets, out = make_pets(tmp_path / "pets"), tmp_path / "run"
    kept = {"data": str(pets), "micro_batch": 2}
    diffusion.train(pets, out, recipe=RECIPE, **QUIET)
    found = read_state(out / "state.safetensors")
    monkeypatch.setattr(
        "diffusion.training.from_data.read_state", lambda path: found | {"command": found["command"] | kept}
    )
    seen = trained_labels(monkeypatch)
    diffusion.train(pets, out, resume=True, **QUIET)
    assert seen[-1].command.items() >= kept.items()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": np.zeros((20, 8, 8, 4), np.uint8)}, r"1 or 3 channels, .* these are \[20, 8, 8, 4\]"),
        ({"out": None}, "out must be the path of a folder, not None"),
    ],
)
def test_mistakes_that_are_told_at_once(change, expected, tmp_path):
    options = {"data": PIXELS, "out": tmp_path / "run"} | change
    with pytest.raises(ValueError, match=expected):
        diffusion.train(options["data"], options["out"], **QUIET)


def test_mistakes_are_told_before_images_are_read(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("images were read")

    pets = make_pets(tmp_path / "pets")
    diffusion.train(pets, tmp_path / "run", recipe=RECIPE, **QUIET)
    monkeypatch.setattr("diffusion.training.from_data.read_images", refuse)
    for out, options, expected in (
        (tmp_path / "run", {}, "holds a run already"),
        (pets / "run", {}, r"lies in the data .*pets, whose images its sample grids would become"),
        (pets, {}, "lies in the data"),
        (tmp_path / "new", {"labels": [0, 1]}, "labels are for a tensor or an array"),
    ):
        with pytest.raises(ValueError, match=expected):
            diffusion.train(pets, out, recipe=RECIPE, **options, **QUIET)
    assert not (pets / "run").exists()
