"""`diffusion train` on folders of images: sizes, recipes, and what is too much for the machine."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import RECIPE

import diffusion
from diffusion.cli import main


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
    assert "labels of the images" in fails([*words, "--resize", "--set", "unet.num_classes=2"], capsys)


def test_resize_is_for_folders_and_squares(words, tmp_path, capsys):
    assert "--resize is for" in fails([*words, "--resize", "--set", "unet.sample_size=[8,16]"], capsys)
    named = ["train", "--data-dir", str(tmp_path), "--out", str(tmp_path / "run"), "--resize"]
    assert "--resize is for" in fails(named, capsys)


def test_changes_are_for_resuming(words, tmp_path, capsys):
    assert "--accept-changes is for --resume" in fails([*words, "--accept-changes"], capsys)
    main([*words, "--resize"])
    longer = [*words, "--resize", "--resume", "--steps", "3"]
    assert "it differs in steps" in fails(longer, capsys)
    main([*longer, "--accept-changes"])
    assert diffusion.load(tmp_path / "run").metadata["training"]["step"] == 3


def test_a_network_that_does_not_fit_into_memory(words, tmp_path, capsys):
    huge = [*words, "--resize", "--set", "unet.channels=10000000"]
    assert "the memory of cpu is not enough; try --micro-batch" in fails(huge, capsys)
    assert not (tmp_path / "run").exists()


def test_compiling_without_a_compiler(words, capsys, monkeypatch):
    def fails_to_compile(*args, **options):
        raise torch._dynamo.exc.InternalTorchDynamoError("no C++ compiler was found")

    monkeypatch.setattr(torch, "compile", lambda network: fails_to_compile)
    told = fails([*words, "--resize", "--compile"], capsys)
    assert "torch.compile fails here; train without --compile: " in told
    assert "no C++ compiler was found" in told
