"""Classes by name: in Python, on the command line, in config.json, and below the images of a grid."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
from diffusion.cli import main
from diffusion.cli.options import parse_labels
from diffusion.storage.images import CAPTION, make_grid
from helpers.models import make_model

NAMES = ("cat", "golden retriever", "2")


@pytest.fixture
def named():
    model = make_model(3, channels=1)
    return diffusion.DDPM(model.unet, model.schedule, class_names=NAMES)


def test_a_name_is_the_number_of_its_class(named):
    options = {"steps": 2, "sampler": "ddim", "seed": 3}
    expected = named.sample(labels=[1, 0, 1], **options)
    assert torch.equal(named.sample(labels=["golden retriever", "cat", 1], **options), expected)
    assert torch.equal(named.sample(labels="cat", **options), named.sample(labels=0, **options))
    with pytest.raises(ValueError, match="unknown class 'dog'; the classes are: cat, golden retriever, 2"):
        named.sample(labels=["cat", "dog"])
    with pytest.raises(ValueError, match=r"classes have no names; give numbers in 0\.\.9"):
        make_model(10).sample(labels=["cat"])


def test_names_are_kept_in_the_folder(named, tmp_path):
    named.save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["class_names"] == list(NAMES)
    assert diffusion.load(tmp_path / "model").class_names == NAMES
    assert named.copy().class_names == NAMES


@pytest.mark.parametrize("names", [("cat", "dog"), ("a", "b", "a"), (1, 2, 3), "abc", 3])
def test_names_that_are_not_those_of_the_classes(names):
    model = make_model(3)
    with pytest.raises(ValueError, match="class_names must be 3 different names, not"):
        diffusion.DDPM(model.unet, model.schedule, class_names=names)
    with pytest.raises(ValueError, match="class_names must be None for a model without classes"):
        diffusion.DDPM(make_model().unet, model.schedule, class_names=["cat"])


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        (["cat", "2", "1"], [0, 2, 1]),
        (["golden retriever", "0-1"], [1, 0, 1]),
        (["cat,2"], [0, 2]),
    ],
)
def test_labels_on_the_command_line(words, labels):
    assert parse_labels(words, NAMES) == labels


def test_a_grid_with_captions(named, tmp_path, capsys):
    named.save(tmp_path / "model")
    out = tmp_path / "grid.png"
    words = ["sample", "--model", str(tmp_path / "model"), "--steps", "2", "--scale", "6", "--out", str(out)]
    main([*words, "--labels", "cat", "golden retriever", "--captions"])
    with Image.open(out) as picture:
        found = np.asarray(picture.convert("L"))
    main([*words, "--labels", "0", "1"])
    with Image.open(out) as picture:
        plain = np.asarray(picture.convert("L"))
    height = plain.shape[0] - 2  # the last rows are padding
    assert found.shape == (plain.shape[0] + CAPTION, plain.shape[1])
    assert np.array_equal(found[:height], plain[:height])
    written = found[height : height + CAPTION] > 100
    assert written[:, : found.shape[1] // 2].any()
    assert written[:, found.shape[1] // 2 :].any()
    assert not found[-2:].any()
    for more, told in (
        (["--labels", "none", "--captions"], "--captions needs labels"),
        (["--captions", "--out", str(tmp_path / "a.gif")], "--captions is for a grid"),
        (["--labels", "dog"], "or names: cat, golden retriever, 2"),
    ):
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert told in capsys.readouterr().err


def test_captions_stay_below_their_image():
    """A text that is too wide is cut, and each is drawn in its own column."""
    grid = np.asarray(make_grid(torch.full((4, 1, 8, 30), -1.0), columns=2, captions=["i" * 90, "", "", "x"]))
    columns = [slice(2, 32), slice(34, 64)]
    rows = [slice(10, 10 + CAPTION), slice(20 + CAPTION, 20 + 2 * CAPTION)]
    drawn = [[bool((grid[row, column] > 100).any()) for column in columns] for row in rows]
    assert drawn == [[True, False], [False, True]]
    outside = grid.copy()
    for row in rows:
        outside[row, columns[0]] = outside[row, columns[1]] = 0
    assert not outside.any()
    with pytest.raises(ValueError, match="captions must be 2 texts"):
        make_grid(torch.zeros(2, 1, 8, 8), captions=["a"])
