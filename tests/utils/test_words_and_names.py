"""Numbers of things in messages, and names of what comes with the package beside files of the same name."""

import json
import warnings
from pathlib import Path

import pytest

import diffusion
from diffusion.classifier import bundled_classifiers, load_classifier
from diffusion.cli import main
from diffusion.data import load_dataset
from diffusion.data.npz import load_images
from diffusion.evaluation.features import load_features
from diffusion.training.recipe import load_recipe
from diffusion.utils.words import counted
from helpers.models import make_model


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (1203, "test image", "1,203 test images"),
        (1, "class", "1 class"),
        (2, "class", "2 classes"),
    ],
)
def test_numbers_of_things(number, noun, words):
    assert counted(number, noun) == words


def test_one_of_each_in_the_messages_of_the_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(1, channels=1).save("model")
    main(["sample", "--model", "model", "--num", "1", "--steps", "1", "--sampler", "ddim", "--out", "a.png"])
    told = capsys.readouterr().out
    assert told.startswith("a.png: 1 image in ")
    assert told.endswith(" s (ddim, 1 step)\n")
    assert "1 class," in repr(diffusion.load("model"))


@pytest.mark.parametrize("given", ["a name", "a path", "a Path"])
def test_a_model_beside_a_folder_of_its_name(given, tmp_path, monkeypatch):
    """The name means the bundled model, as it does without the folder, and a warning tells of the folder."""
    monkeypatch.chdir(tmp_path)
    make_model(channels=3).save("mnist")
    if given == "a name":
        with pytest.warns(
            UserWarning, match=r"^mnist is the model of the package; .* folder .* is \./mnist$"
        ):
            model = diffusion.load("mnist")
        assert model.unet.config.image_shape == (28, 28)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = diffusion.load("./mnist" if given == "a path" else Path("mnist"))
        assert model.unet.config.image_shape == (8, 8)


def test_a_classifier_beside_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cifar10-classifier").mkdir()
    own = bundled_classifiers()["cifar10-classifier"]
    for load in (load_classifier, load_features):
        with pytest.warns(UserWarning, match=r"^cifar10-classifier is the classifier of the package"):
            load("cifar10-classifier")
        for path in ("./cifar10-classifier", Path("cifar10-classifier")):
            with pytest.raises(ValueError, match=r"^cifar10-classifier holds no usable classifier"):
                load(path)
    assert load_classifier(own)[0].shape == (3, 32, 32)
    Path("classifier").write_text("")
    with pytest.warns(
        UserWarning, match=r"^classifier is the feature network of .* file .* is \./classifier$"
    ):
        assert load_features("classifier").shape == (1, 28, 28)


@pytest.mark.parametrize("load", [load_dataset, load_images])
def test_a_data_set_beside_a_folder_of_its_name(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mnist").mkdir()
    Path("mnist/shard-00000.npz").write_text("")
    with (
        pytest.warns(UserWarning, match=r"^mnist is the data set of the package"),
        pytest.raises(ValueError, match=r"^mnist needs --data-dir"),
    ):
        load("mnist")
    with pytest.raises(ValueError, match=r"shard-00000|no image"):
        load("./mnist")


def test_training_tells_of_a_folder_with_the_name_of_a_data_set(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("cifar10").mkdir()
    with pytest.raises(SystemExit):
        main(["train", "--data", "cifar10", "--out", "run"])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "diffusion: warning: cifar10 is the data set of the package; the folder of this name is ./cifar10",
        "diffusion: --data-dir is missing: the folder that holds cifar10",
    ]


def test_a_command_tells_a_warning_once(tmp_path, monkeypatch, capsys):
    """The name is looked up by the command, and again by what reads the images."""
    monkeypatch.chdir(tmp_path)
    Path("cifar10").mkdir()
    with pytest.raises(SystemExit):
        main(["train", "--recipe", "cifar10", "--data", "cifar10", "--data-dir", "nowhere", "--out", "run"])
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("diffusion: warning: cifar10 is the data set of the package;")
    assert "nowhere" in error


def test_a_recipe_is_told_from_a_file_by_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mnist").write_text("{}")
    Path("mnist.json").write_text(json.dumps({"steps": 7}))
    assert load_recipe("mnist").steps != 7
    assert load_recipe("mnist.json").steps == 7
