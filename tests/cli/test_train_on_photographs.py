"""`diffusion train --data FOLDER --out RUN`: all else comes from the images."""

import json
import os
import re
import shutil
import signal
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
from diffusion.classifier.__main__ import main as train_a_classifier
from diffusion.cli import main
from diffusion.data.image_set import Survey
from diffusion.models.config import UNetConfig
from diffusion.training.fitting import held_out_by_default, most_held_out, small_recipe, split
from diffusion.training.outlook import disk_use, duration
from diffusion.training.recipe import load_recipe
from diffusion.training.trainer import Trainer
from helpers.paths import ROOT
from helpers.thinning import exhaustive_but
from helpers.training import make_trainer, run
from helpers.work import size_and_flops

# A network of a few thousand parameters in place of a recipe's, for the same data.
TINY = ["unet.channels=8", "unet.channel_mult=[1,1,1]", "unet.num_res_blocks=1", "unet.attention_levels=[]"]
TINY += ["unet.norm_groups=4", "unet.time_embed_dim=16", "batch_size=4", "warmup_steps=0"]


@pytest.fixture(autouse=True)
def no_grids(monkeypatch):
    """Grids take longer than the runs here."""
    monkeypatch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)


def make_photographs(folder, sizes, classes=("cat", "golden retriever"), mode="RGB") -> Path:
    """Images of these heights and widths in turn, as many of each class."""
    pixels = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k, size in enumerate(sizes):
            shape = (*size, 3) if mode == "RGB" else size
            Image.fromarray(pixels.integers(0, 256, shape, np.uint8)).save(folder / name / f"{k}.png")
    return folder


@pytest.mark.parametrize(
    ("size", "side", "name", "expected"),
    [
        ((28, 28), 28, "small-32", 28),
        ((32, 32), 32, "small-32", 32),
        ((24, 40), 24, "small-32", (24, 40)),
        ((30, 30), 30, "small-32", 28),  # 30 cannot be halved twice
        ((32, 64), 32, "small-32", 32),  # too wide
        ((5, 5), 5, "small-32", 4),
        (None, 37, "small-32", 32),
        ((48, 64), 48, "small-64", (48, 64)),
        ((64, 64), 64, "small-64", 64),
        (None, 50, "small-64", 48),
        (None, 900, "small-64", 64),
        ((178, 218), 178, "small-64", 64),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_recipe_follows_from_the_images(size, side, name, expected, channels):
    found, recipe = small_recipe(Survey(100, channels, size, side, labelled=channels == 3))
    own = load_recipe(name)
    assert found == name
    assert recipe.horizontal_flip == (channels == 3)
    taken = {"sample_size": expected, "in_channels": channels, "out_channels": channels}
    taken["num_classes"] = 10 if channels == 3 else None
    assert recipe.unet == own.unet | taken | {"sample_size": recipe.unet["sample_size"]}
    assert UNetConfig.from_dict(recipe.unet).image_shape == (
        expected if isinstance(expected, tuple) else (expected, expected)
    )
    assert recipe.steps == own.steps


def test_the_small_recipes_are_that_of_cifar10():
    """small-32 is that recipe, so that its measurements hold; small-64 has a level of 16 channels more."""
    small, large, cifar10 = (load_recipe(name) for name in ("small-32", "small-64", "cifar10"))
    assert small == cifar10
    assert replace(large, unet=cifar10.unet) == cifar10
    ours, theirs = (UNetConfig.from_dict(recipe.unet) for recipe in (large, cifar10))
    assert ours.image_shape == tuple(2 * side for side in theirs.image_shape)
    widths = [[config.channels * factor for factor in config.channel_mult] for config in (ours, theirs)]
    assert widths[0] == [16, *widths[1]]


@pytest.mark.parametrize("name", ["small-32", "small-64"])
def test_the_work_of_the_small_recipes_is_what_their_page_says(name):
    recipe = load_recipe(name)
    parameters, flops = size_and_flops(UNetConfig.from_dict(recipe.unet))
    row = f"| `{name}` | {parameters / 1e6:.2f} M | {flops / 1e9:.2f} | {recipe.steps:,} |"
    assert row in (ROOT / "docs" / "own-images.md").read_text()


def test_a_folder_of_photographs_is_all_that_is_needed(tmp_path, capsys):
    folder = make_photographs(tmp_path / "pets", [(70, 90), (90, 80), (64, 66)] * 4)
    out = tmp_path / "run"
    main(["train", "--data", str(folder), "--out", str(out), "--steps", "1", "--set", *TINY])
    line, disk, *_ = capsys.readouterr().out.splitlines()
    assert line.startswith(
        f"{folder}: 24 images (1 held out), 64 x 64 (the middle square, scaled), 3 channels, 2 classes: cat, "
        "golden retriever; recipe small-64: "
    )
    assert re.search(r"[\d,]+ parameters, 1 step of 4 images, about \d+ seconds? on cpu$", line)
    assert re.fullmatch(rf"{out}: up to \d+ [KM]iB on disk, of [\d,]+ GiB free", disk)
    model = diffusion.load(out)
    assert model.num_classes == 2
    assert model.unet.config.image_shape == (64, 64)
    assert (out / "log.csv").read_text().splitlines()[1].split(",")[2]  # a loss of the image held out


def test_without_labels_the_model_has_none(tmp_path, capsys):
    folder = make_photographs(tmp_path / "set", [(12, 12)] * 6, classes=("all",), mode="L")
    for path in (folder / "all").iterdir():
        path.rename(folder / path.name)
    (folder / "all").rmdir()
    words = ["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--steps", "1", "--set"]
    main([*words, *(change for change in TINY if not change.startswith("batch"))])
    line = capsys.readouterr().out.splitlines()[0]
    assert (
        "6 images, 12 x 12, 1 channel, no labels, batches of 6 (the recipe had 128); recipe small-32" in line
    )
    assert diffusion.load(tmp_path / "run").num_classes is None


def test_images_held_out_are_not_trained_on():
    kept, held_out = split(100, 7, seed=0)
    assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(100))
    assert len(held_out) == 7
    assert torch.equal(split(100, 7, seed=0)[1], held_out)
    assert not torch.equal(split(100, 7, seed=1)[1], held_out)


def test_the_last_image_of_a_class_is_not_held_out():
    """Otherwise the images held out are those without labels; all but one of each class can be."""
    labels = torch.tensor([2] + [0] * 60 + [1] * 38 + [3])
    for seed in range(30):
        free, whole = split(100, 20, seed)[1], split(100, 20, seed, labels)[1]
        assert not {0, 99} & set(whole.tolist())
        assert len(whole) == 20
        if not {0, 99} & set(free.tolist()):
            assert torch.equal(free, whole)
        kept, most = split(100, most_held_out(100, labels), seed, labels)
        assert sorted(labels[kept].tolist()) == [0, 1, 2, 3]
        assert len(most) == 96
    assert held_out_by_default(60, torch.arange(60)) == 0
    assert held_out_by_default(60, None) == 3


def header(path: Path) -> int:
    """Bytes of a safetensors file before its tensors."""
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def test_the_disk_use_told_is_that_of_the_files(tmp_path, monkeypatch):
    trainer, asked = make_trainer(), []
    monkeypatch.setattr("diffusion.training.outlook.amount", lambda size: asked.append(size) or str(size))
    disk_use(trainer, tmp_path / "run")
    run(tmp_path / "run", trainer)
    state, model = tmp_path / "run" / "state.safetensors", tmp_path / "run" / "model.safetensors"
    tensors = [path.stat().st_size - header(path) for path in (state, model)]
    counters = 4 * len(list(trainer.model.unet.parameters()))  # Adam's step, a number for each parameter
    assert asked[0] == 2 * (tensors[0] - counters) + 2 * tensors[1]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(ValueError, match=r"needs up to .* and its disk has 0 free"):
            disk_use(trainer, tmp_path / "run")


def test_times_in_words():
    times = (0.2, 1, 60, 100, 5340, 33480, 864000)
    told = ["1 second", "1 second", "60 seconds", "2 minutes", "89 minutes", "9.3 hours", "10 days"]
    assert [duration(time) for time in times] == told


def test_resume_and_out_are_enough(tmp_path, capsys, monkeypatch):
    """The run goes on with the options that it began with, from another folder too, on the same images."""
    make_photographs(tmp_path / "pets", [(70, 90), (90, 80)] * 12)
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", "pets", "--out", "run", "--save-every", "2", "--micro-batch", "2"]
    main([*words, "--steps", "2", "--set", *TINY])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resumed = ["train", "--resume", "--out", "../run", "--accept-changes", "--steps", "3"]
    main(resumed)
    told_text = capsys.readouterr().out
    minutes, rate = map(float, re.findall(r"3 steps in ([\d.]+) minutes .* ([\d.]+) images/s", told_text)[0])
    assert (minutes - 0.05) * 60 * (rate - 0.05) <= 3 * 4 <= (minutes + 0.05) * 60 * (rate + 0.05)
    first, second = (line for line in told_text.splitlines() if "2 classes" in line)
    assert "48 images (2 held out), 64 x 64 (the middle square, scaled)" in first
    assert second.partition(": ")[2].startswith("48 images (2 held out), 64 x 64 (the middle square, scaled)")
    assert "1 step of 4 images" in second
    assert diffusion.load("../run").metadata["training"]["step"] == 3
    with pytest.raises(SystemExit):
        main(["train", "--resume"])
    assert "--out is missing: the folder of the run to resume" in capsys.readouterr().err


def test_show_prints_the_recipe_that_the_images_choose(tmp_path, capsys):
    folder = make_photographs(tmp_path / "pets", [(20, 20)] * 2)
    main(["train", "--data", str(folder), "--show"])
    assert json.loads(capsys.readouterr().out)["unet"]["sample_size"] == 20


@pytest.mark.parametrize("number", exhaustive_but([signal.SIGINT, signal.SIGTERM], default=[signal.SIGTERM]))
def test_a_signal_says_how_to_go_on(number, tmp_path, capsys, monkeypatch):
    """The bar counts steps, as the options do."""
    folder = make_photographs(tmp_path / "pets", [(8, 8)] * 4)
    step = Trainer.train_step

    def told(self):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", told)
    words = ["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--log-every", "1"]
    with pytest.raises(SystemExit) as caught:
        main([*words, "--steps", "5", "--set", *TINY])
    assert caught.value.code == 130
    told_text = capsys.readouterr().err
    assert told_text.splitlines()[-1] == "stopped at step 3; go on with --resume"
    assert re.search(r"3/5 \[.* steps.*images/s", told_text)
    monkeypatch.setattr(Trainer, "train_step", step)
    for more, way in (([], "go on with --resume"), (["--resume", "--steps", "9"], "--accept-changes")):
        with pytest.raises(SystemExit):
            main([*words, "--set", *TINY, *more])
        assert way in capsys.readouterr().err.splitlines()[-1]
    main(["train", "--resume", "--out", str(tmp_path / "run")])
    assert diffusion.load(tmp_path / "run").metadata["training"]["step"] == 5


def test_the_images_trained_on_are_the_reference(tmp_path, capsys, monkeypatch):
    """`evaluate --resize` reads them as training did: the square in the middle, in the model's channels."""
    folder = make_photographs(tmp_path / "pets", [(40, 70), (66, 50)] * 2)
    words = ["train", "--data", str(folder), "--out", str(tmp_path / "run"), "--steps", "1", "--set", *TINY]
    main([*words, "unet.sample_size=16"])
    seen = []

    def compared(samples, reference, features, metrics, **options):
        seen.append((samples, reference))
        return {"metrics": {"fid": 0.0}, "protocol": {}}

    monkeypatch.setattr("diffusion.cli.evaluate.compare", compared)
    monkeypatch.setattr("diffusion.cli.evaluate.check_comparison", lambda *_: None)
    words = ["evaluate", "--model", str(tmp_path / "run"), "--reference", str(folder), "--num", "4"]
    words += ["--features", "classifier", "--steps", "1"]
    main([*words, "--resize"])
    ((samples, reference),) = seen
    assert samples.images.shape == (4, 3, 16, 16)
    assert reference.name == f"{folder} (the middle square, scaled)"
    for index, path in enumerate(sorted(folder.glob("*/*.png"))):
        with Image.open(path) as image:
            side = min(image.size)
            box = [(length - side) // 2 for length in image.size]
            square = image.crop((*box, box[0] + side, box[1] + side))
            expected = np.asarray(square.resize((16, 16), Image.Resampling.LANCZOS))
        assert np.array_equal(reference.images[index].permute(1, 2, 0), expected)
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().err.splitlines()[-1].endswith("make them of one size, or add --resize")
    with pytest.raises(SystemExit):
        main([*words[:4], str(tmp_path / "a.npz"), *words[5:], "--resize"])
    assert "--resize is for a folder or zip of images" in capsys.readouterr().err


def test_the_classifier_reads_images_of_any_size(tmp_path, monkeypatch, capsys):
    folder = make_photographs(tmp_path / "pets", [(40, 70), (66, 50)])
    seen = []

    def trained(images, labels, **options):
        seen.append(images)
        raise ValueError("enough")

    monkeypatch.setattr("diffusion.classifier.command.train_classifier", trained)
    words = ["--data", str(folder), "--test-data", str(folder), "--out", str(tmp_path / "classifier")]
    with pytest.raises(SystemExit):
        train_a_classifier([*words, "--sample-size", "4", "--resize", "16"])
    assert capsys.readouterr().err.endswith("enough\n")
    assert seen[0].shape == (4, 3, 16, 16)
    with pytest.raises(SystemExit):
        train_a_classifier(["--data", "mnist", "--out", str(tmp_path / "classifier"), "--resize", "16"])
    assert "--resize is for a folder or zip of images, and --data is mnist" in capsys.readouterr().err


def test_the_classifier_holds_images_out(tmp_path, monkeypatch, capsys):
    """Of 25 and 4 images, 2 and 1: one of ten of each class, at least one, the same in every call."""
    folder = make_photographs(tmp_path / "pets", [(16, 16)] * 25)
    for path in sorted((folder / "cat").iterdir())[4:]:
        path.unlink()
    seen = []

    def trained(images, labels, **options):
        seen.append((images, labels))
        raise ValueError("enough")

    monkeypatch.setattr("diffusion.classifier.command.train_classifier", trained)
    words = ["--data", str(folder), "--out", str(tmp_path / "classifier")]
    for _ in range(2):
        with pytest.raises(SystemExit):
            train_a_classifier(words)
        assert "pets: 26 images to train on, 3 to test with" in capsys.readouterr().out
    assert torch.bincount(seen[0][1]).tolist() == [3, 23]
    assert torch.equal(seen[0][0], seen[1][0])
    for path in sorted((folder / "cat").iterdir())[1:]:
        path.unlink()
    with pytest.raises(SystemExit):
        train_a_classifier(words)
    assert "the class cat of " in (error := capsys.readouterr().err)
    assert error.endswith("has 1 image, and needs two, of which one is a test image; or give --test-data\n")
