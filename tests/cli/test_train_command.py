"""`diffusion train` on folders of images: sizes, recipes, and the machine's limits."""

import argparse
import json

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
from diffusion.cli import main, train, training_data
from helpers.training import DATA, RECIPE, torchvision_works


@pytest.fixture
def folder(tmp_path):
    """Three classes of images of two sizes."""
    pixels = np.random.default_rng(0)
    for label in "abc":
        (tmp_path / "images" / label).mkdir(parents=True)
        for k in range(4):
            image = Image.fromarray(pixels.integers(0, 256, (9 + k % 2, 10), np.uint8))
            image.save(tmp_path / "images" / label / f"{k}.png")
    return tmp_path / "images"


@pytest.fixture
def words(folder, tmp_path):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"unet": RECIPE.unet, "steps": 2, "batch_size": 4}))
    return ["train", "--recipe", str(recipe), "--data", str(folder), "--out", str(tmp_path / "run")]


def fails(words, capsys) -> str:
    """The last line of standard error; there is no other but the progress."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_images_of_any_size_are_scaled_where_asked(words, tmp_path, capsys):
    assert "images of one size are needed" in fails(words, capsys)
    main([*words, "--resize"])
    assert diffusion.load(tmp_path / "run").num_classes == 3
    words[-1] = str(tmp_path / "other")
    told = fails([*words, "--resize", "--set", "unet.num_classes=2"], capsys)
    assert "has 3 classes (a, b, c), but unet.num_classes is 2 in --set" in told


def test_resize_makes_squares(words, capsys):
    assert "8 x 16" in fails([*words, "--resize", "--set", "unet.sample_size=[8,16]"], capsys)


def test_options_of_other_data_are_not_passed_over(words, tmp_path, capsys):
    named = ["train", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert "--resize is for a folder or zip" in fails([*named, "--resize"], capsys)
    assert "--cache is for a folder or zip" in fails([*named, "--cache", str(tmp_path)], capsys)
    for option in (["--data-dir", str(tmp_path)], ["--download"]):
        assert f"{option[0]} is for the data sets mnist, cifar10" in fails([*words, *option], capsys)


@pytest.mark.skipif(not torchvision_works(), reason="the data set is read by torchvision")
def test_validation_data_take_the_place_of_the_test_split(words, folder, tmp_path, capsys):
    named = ["train", "--data-dir", str(DATA), "--out", str(tmp_path / "run"), "--validation-data"]
    assert "images of one size are needed" in fails([*named, str(folder)], capsys)


def test_validation_images_are_of_every_class(words, folder, monkeypatch):
    monkeypatch.setattr(training_data, "VALIDATION_IMAGES", 6)
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args([*words[1:], "--resize", "--validation-data", str(folder)])
    images, labels = training_data.load_data(args, train.choose_recipe(args)).validation
    assert images.shape == (6, 1, 8, 8)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.skipif(not torchvision_works(), reason="the data set is read by torchvision")
def test_a_download_that_fails_says_why(tmp_path, capsys, monkeypatch):
    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    named = ["train", "--data", "cifar10", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")]
    assert "no network" in fails([*named, "--download"], capsys)


def test_changes_are_for_resuming(words, tmp_path, capsys):
    assert "--accept-changes is for --resume" in fails([*words, "--accept-changes"], capsys)
    main([*words, "--resize"])
    longer = [*words, "--resize", "--resume", "--steps", "3"]
    assert "it differs in steps" in fails(longer, capsys)
    main([*longer, "--accept-changes"])
    assert diffusion.load(tmp_path / "run").metadata["training"]["step"] == 3


def test_a_network_that_does_not_fit_into_memory(words, tmp_path, capsys, monkeypatch):
    def too_large(config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes.")

    monkeypatch.setattr("diffusion.training.trainer.UNet", too_large)
    told = fails([*words, "--resize"], capsys)
    assert "the memory of cpu is not enough; try --micro-batch" in told
    assert not (tmp_path / "run").exists()


def test_compiling_without_a_compiler(words, capsys, monkeypatch):
    def fails_to_compile(*args, **options):
        raise torch._dynamo.exc.InternalTorchDynamoError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", lambda network: fails_to_compile)
    told = fails([*words, "--resize", "--compile"], capsys)
    assert "torch.compile fails here; train without --compile: " in told
    assert "no C++ compiler was found" in told
