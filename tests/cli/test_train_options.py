"""Options of `diffusion train` that a run keeps, on resuming; and how images choose a recipe."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffusion
from diffusion.cli import main
from diffusion.training.state import read_state

TINY = ["unet.channels=8", "unet.channel_mult=[1,1,1]", "unet.num_res_blocks=1", "unet.attention_levels=[]"]
TINY += ["unet.norm_groups=4", "unet.time_embed_dim=16", "batch_size=4", "warmup_steps=0"]
PIXELS = np.random.default_rng(0).integers(0, 256, (120, 8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def no_grids(monkeypatch):
    """Grids take longer than the runs here."""
    monkeypatch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)


@pytest.fixture
def pets(tmp_path) -> Path:
    return make_pets(tmp_path / "pets", 12)


def make_pets(folder, count, mode="RGB") -> Path:
    for k in range(count):
        (folder / ["cat", "dog"][k % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[k]).convert(mode).save(folder / ["cat", "dog"][k % 2] / f"{k:03d}.png")
    return folder


def begin(data, out, *words):
    main(["train", "--data", str(data), "--out", str(out), "--steps", "1", "--set", *TINY, *words])


def command(out) -> dict:
    return read_state(out / "state.safetensors")["command"]


def told(words, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*map(str, words)])
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def trainers(monkeypatch) -> list:
    """Grows by the trainer of each run from here on."""
    seen = []
    monkeypatch.setattr("diffusion.cli.train.train", lambda trainer, *rest, **options: seen.append(trainer))
    return seen


def make_photographs(folder, suffix, orientations, size=(24, 32)) -> Path:
    """Images that are all of this height and width once they are upright."""
    folder.mkdir()
    for k, orientation in enumerate(orientations):
        height, width = size if orientation < 5 else size[::-1]
        exif = Image.Exif()
        exif[0x0112] = orientation
        pixels = np.random.default_rng(k).integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.{suffix}", exif=exif)
    return folder


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_sizes_are_those_of_upright_images(suffix, tmp_path, capsys):
    folder = make_photographs(tmp_path / "set", suffix, [1, 6, 8, 3, 5, 7, 2, 4])
    begin(folder, tmp_path / "run")
    assert "8 images, 32 x 24, 3 channels" in capsys.readouterr().out
    assert diffusion.load(tmp_path / "run").unet.config.image_shape == (24, 32)


def test_resize_is_the_users(tmp_path, capsys, monkeypatch):
    """It makes squares also of images of one size, and of those whose other sizes the survey missed."""
    folder = make_photographs(tmp_path / "set", "png", [1] * 8)
    begin(folder, tmp_path / "run", "--resize")
    assert "24 x 24 (the middle square, scaled)" in capsys.readouterr().out
    Image.fromarray(PIXELS[0]).resize((40, 40)).save(folder / "7.png")
    monkeypatch.setattr("diffusion.data.decoding.MAX_SURVEYED", 2)
    begin(folder, tmp_path / "other", "--resize")
    assert "24 x 24 (the middle square, scaled)" in capsys.readouterr().out
    words = ["train", "--data", folder, "--out", tmp_path / "third", "--no-resize"]
    assert told(words, capsys).endswith("make them of one size, or add --resize")


def test_switches_are_kept_and_can_be_turned_off(pets, tmp_path, monkeypatch):
    out = tmp_path / "run"
    begin(pets, out, "--checkpointing", "--resize")
    assert command(out).items() >= {"checkpointing": True, "resize": True}.items()
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda unet: compiled.append(unet) or unet)
    seen = trainers(monkeypatch)
    for words in ([], ["--compile"], ["--no-checkpointing", "--no-tensorboard", "--no-compile"]):
        main(["train", "--resume", "--out", str(out), *words])
    assert [trainer.command["checkpointing"] for trainer in seen] == [True, True, False]
    assert len(compiled) == 1
    assert seen[2].command.items() >= {"compile": False, "tensorboard": False}.items()


def test_a_run_goes_on_with_the_images_held_out(pets, tmp_path, monkeypatch):
    out = tmp_path / "run"
    begin(pets, out, "--hold-out", "4", "--seed", "3")
    assert command(out)["hold_out_seed"] == 3
    seen = trainers(monkeypatch)
    for words in ([], ["--accept-changes", "--seed", "8"]):
        main(["train", "--resume", "--out", str(out), *words])
    assert seen[1].recipe.seed == 8
    assert torch.equal(seen[0].images.indices, seen[1].images.indices)
    assert torch.equal(seen[0].validation[0], seen[1].validation[0])


class Counted:
    """Features that are the mean colours of images."""

    def check(self, images):
        pass

    def in_channels(self, images):
        return images

    def of(self, images):
        return images.double().mean((2, 3)), None


def test_the_default_distance_goes_on(tmp_path, monkeypatch):
    """It is kept by name, so that it neither stops nor begins on resuming; a folder's path is absolute."""
    asked = []
    monkeypatch.setattr("diffusion.cli.train.load_features", lambda name: asked.append(name) or Counted())
    monkeypatch.setattr("diffusion.cli.train.MIN_MEASURED", 3)
    pets = make_pets(tmp_path / "pets", 12)
    for name, words, features in (
        ("run", ["--hold-out", "4"], "efficientnet-lite0"),
        ("few", ["--hold-out", "2"], "none"),
    ):
        begin(pets, tmp_path / name, *words)
        assert command(tmp_path / name)["features"] == features
        asked.clear()
        changes = ["--accept-changes", "--steps", "2"]
        main(["train", "--resume", "--out", str(tmp_path / name), *changes])
        assert asked == ([features] if name == "run" else [])
    assert [row.split(",")[0] for row in (tmp_path / "run" / "distances.csv").read_text().split()] == [
        "step",
        "1",
        "2",
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "classifier").mkdir()
    begin(pets, tmp_path / "own", "--hold-out", "4", "--features", "classifier")
    assert command(tmp_path / "own")["features"] == str(tmp_path / "classifier")


def test_another_recipe_or_start_is_refused_on_resuming(pets, tmp_path, capsys):
    out = tmp_path / "run"
    begin(pets, out)
    resumed = ["train", "--resume", "--out", out]
    assert "run is of small-32, not of small-64" in told([*resumed, "--recipe", "small-64"], capsys)
    told_text = told([*resumed, "--init", "mnist"], capsys)
    assert "run began from random weights, not mnist; leave out --init" in told_text
    main([*map(str, resumed), "--recipe", "small-32"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("autocast", "bf"),
        ("data", 5),
        ("data", ["pets"]),
        ("validation_data", 7),
        ("cache", [1]),
        ("features", 7),
        ("channels_last", "no"),
        ("resize", "yes"),
        ("tensorboard", "yes"),
        ("compile", 1),
        ("hold_out_seed", "x"),
        ("save_every", "often"),
        ("save_minutes", "x"),
    ],
)
def test_kept_options_of_nonsense(pets, tmp_path, capsys, name, value):
    out = tmp_path / "run"
    begin(pets, out)
    path = out / "state.safetensors"
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["training"])
    found["command"][name] = value
    save_file(load_file(path), path, metadata={"training": json.dumps(found)})
    error = told(["train", "--resume", "--out", out], capsys)
    assert "state.safetensors is no training state, or damaged: " in error
    assert name in error


def test_a_run_within_its_warm_up_is_told(pets, tmp_path, capsys):
    begin(pets, tmp_path / "run", "warmup_steps=7")
    assert "1 step of 4 images, all in the warm-up of 7, about" in capsys.readouterr().out
    begin(pets, tmp_path / "other")
    assert "1 step of 4 images, about" in capsys.readouterr().out


def test_a_constant_rate_has_no_decay(pets, tmp_path, capsys):
    words = ["train", "--data", pets, "--out", tmp_path / "run", "--set", "decay_fraction=0.5"]
    assert "does nothing to a constant learning rate" in told(
        [*words, "learning_rate_decay=constant"], capsys
    )


def test_a_run_from_python_needs_its_data(tmp_path, capsys):
    unet = {"sample_size": 8, "channels": 8, "channel_mult": [1], "num_res_blocks": 1, "attention_levels": []}
    unet |= {"norm_groups": 4, "in_channels": 3, "out_channels": 3}
    recipe = diffusion.Recipe(unet=unet, steps=1, batch_size=4, more_ema_decays=())
    diffusion.train(PIXELS[:8], tmp_path / "run", recipe=recipe, progress=False, device="cpu")
    assert "--data is missing: the run in " in told(["train", "--resume", "--out", tmp_path / "run"], capsys)


def test_mistakes_are_told_before_images_are_read(pets, tmp_path, capsys, monkeypatch):
    begin(pets, tmp_path / "run")
    monkeypatch.setattr("diffusion.cli.train.load_data", lambda *arguments, **options: 1 / 0)
    words = ["train", "--data", pets, "--out"]
    assert "holds a run already" in told([*words, tmp_path / "run"], capsys)
    assert "lies in the --data " in told([*words, pets / "run"], capsys)
    others = make_pets(tmp_path / "others", 4)
    inside = [*words, others / "cat" / "run", "--validation-data", others]
    assert "lies in the --validation-data " in told(inside, capsys)


def test_a_recipe_that_show_prints_serves_its_images(pets, tmp_path, capsys):
    grey = make_pets(tmp_path / "grey", 8, mode="L")
    for data, words, channels, flip in (
        (pets, [], 3, True),
        (grey, [], 1, False),
        (grey, ["--recipe", "small-32", "--resize", "--set", "unet.sample_size=8"], 1, False),
        (grey, ["--recipe", "small-32", "--resize", "--set", "horizontal_flip=true"], 1, True),
        (pets, ["--recipe", "cifar10", "--set", "unet.sample_size=8"], 3, True),
    ):
        main(["train", "--data", str(data), "--show", *words])
        text = capsys.readouterr().out
        found = json.loads(text)
        assert (found["unet"]["num_classes"], found["unet"]["in_channels"]) == (2, channels)
        assert found["horizontal_flip"] == flip
        (tmp_path / "own.json").write_text(text)
    main(["train", "--data", str(grey), "--show"])
    (tmp_path / "own.json").write_text(capsys.readouterr().out)
    words = ["--data", str(grey), "--recipe", str(tmp_path / "own.json"), "--out", str(tmp_path / "run")]
    main(["train", *words, "--steps", "1", "--set", *TINY])
    assert diffusion.load(tmp_path / "run").num_classes == 2


def test_each_class_keeps_an_image_to_train_on(pets, tmp_path, capsys):
    """Of 7 images, one a cat: the cat is never held out, and at most 5 images are."""
    for path in sorted((pets / "cat").iterdir())[1:]:
        path.unlink()
    begin(pets, tmp_path / "run", "--hold-out", "5")
    found = capsys.readouterr().out
    assert "7 images (5 held out)" in found
    assert "no images of" not in found
    words = ["train", "--data", pets, "--out", tmp_path / "other", "--hold-out", "6"]
    assert "--hold-out must be a whole number in 0..5" in told(words, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--features", "nonesuch"], "nonesuch holds no usable classifier"),
        (["--micro-batch", 0], "--micro-batch must be a whole number"),
        (["--validation-data", "nowhere"], "nowhere"),
        (
            ["--set", "unet.num_classes=10"],
            "pets has 2 classes (cat, dog), but unet.num_classes is 10 in --set",
        ),
    ],
    ids=str,
)
def test_mistakes_are_told_before_images_are_decoded(words, message, pets, tmp_path, monkeypatch, capsys):
    def decode(*arguments, **options):
        pytest.fail("it decoded the images")

    monkeypatch.setattr("diffusion.cli.training_data.load_dataset", decode)
    assert message in told(["train", "--data", pets, "--out", tmp_path / "run", *words], capsys)


def test_options_of_many_values_add_up(pets, tmp_path, capsys):
    """`--set A --set B` is `--set A B`."""
    changes = ["--set", "batch_size=3", "--set", "unet.channels=24", "warmup_steps=7"]
    main(["train", "--data", str(pets), "--show", *changes])
    recipe = json.loads(capsys.readouterr().out)
    assert (recipe["batch_size"], recipe["unet"]["channels"], recipe["warmup_steps"]) == (3, 24, 7)
