"""`diffusion train` on one's own data: the classes and channels of the recipe are those of the images."""

import argparse
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
from diffusion.cli import main
from diffusion.cli.train import add_arguments, choose_recipe
from diffusion.cli.training_data import TrainingData, load_data
from diffusion.data import NAMED_SETS, NamedSet, load_dataset
from diffusion.training.recipe import load_recipe
from helpers.training import DATA, RECIPE, torchvision_works


def make_images(folder, classes=("cat", "dog", "eel"), mode="RGB", size=28, count=4):
    pixels = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k in range(count):
            shape = (size, size, 3) if mode == "RGB" else (size, size)
            Image.fromarray(pixels.integers(0, 256, shape, np.uint8)).save(folder / name / f"{k}.png")
    return folder


def label_by_list(folder, labels: list[int]):
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.png"))
    pairs = [[name, labels[k % len(labels)]] for k, name in enumerate(names)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))


def loaded(data, *words) -> TrainingData:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["--data", str(data), *map(str, words)])
    return load_data(args, choose_recipe(args, args.init and diffusion.load(args.init)))


def own_recipe(path, **unet):
    path.write_text(json.dumps({"unet": {"channel_mult": [1, 2], "attention_levels": []} | unet}))
    return path


@pytest.fixture
def colour(tmp_path):
    return make_images(tmp_path / "colour")


@pytest.fixture
def grey(tmp_path):
    return make_images(tmp_path / "grey", mode="L")


def test_a_recipe_of_the_package_takes_classes_and_channels_from_the_data(colour, grey):
    recipe = load_recipe("mnist")
    found = loaded(colour, "--recipe", "mnist")
    taken = {"num_classes": 3, "in_channels": 3, "out_channels": 3}
    assert found.recipe.unet == recipe.unet | taken
    assert found.images.shape == (12, 3, 28, 28)
    assert found.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.found == (
        f"{colour}: 12 images, 28 x 28, 3 channels (the recipe had 1), 3 classes (the recipe had 10): "
        "cat, dog, eel"
    )
    found = loaded(grey, "--recipe", "cifar10", "--resize")
    assert found.recipe.unet.items() >= {"num_classes": 3, "in_channels": 1, "out_channels": 1}.items()
    assert found.images.shape[1] == 1
    assert ", 1 channel (the recipe had 3), 3 classes" in found.found


def test_pixels_are_those_of_the_files(colour):
    found = loaded(colour, "--recipe", "mnist")
    pixels = np.asarray(Image.open(colour / "dog" / "1.png"))
    assert np.array_equal(found.images[5].permute(1, 2, 0), pixels)


def channels_of(found: TrainingData) -> tuple[int, int]:
    config = diffusion.UNetConfig.from_dict(found.recipe.unet)
    return config.in_channels, config.out_channels


@pytest.mark.parametrize("wanted", [2, 10])
@pytest.mark.parametrize("where", ["--set", "file"])
def test_a_number_of_classes_that_the_user_wrote_is_refused(wanted, where, colour, tmp_path):
    if where == "--set":
        words = ("--recipe", "mnist", "--set", f"unet.num_classes={wanted}")
    else:
        where = own_recipe(tmp_path / "own.json", sample_size=28, num_classes=wanted)
        words = ("--recipe", where)
    with pytest.raises(ValueError, match="3 classes") as caught:
        loaded(colour, *words)
    told = f"has 3 classes (cat, dog, eel), but unet.num_classes is {wanted} in {where}"
    assert told in str(caught.value)
    assert str(caught.value).endswith("--set unet.num_classes=3")
    assert loaded(colour, *words[:2], "--set", "unet.num_classes=3").recipe.unet["num_classes"] == 3


def test_colour_is_dropped_where_it_is_asked_for_and_never_else(colour, tmp_path):
    recipe = own_recipe(tmp_path / "own.json", sample_size=28, in_channels=1, out_channels=1, num_classes=3)
    with pytest.raises(
        ValueError, match=r"holds colour, which .*own\.json would lose: unet.in_channels is 1"
    ):
        loaded(colour, "--recipe", recipe)
    asked = loaded(colour, "--recipe", recipe, "--set", "unet.in_channels=1")
    assert asked.images.shape == (12, 1, 28, 28)
    assert "1 channel (colour is dropped, as --set asks)" in asked.found
    kept = loaded(colour, "--recipe", recipe, "--set", "unet.in_channels=3", "unet.out_channels=3")
    assert kept.images.shape == (12, 3, 28, 28)


def test_grey_images_are_repeated_for_a_network_of_colour(grey, tmp_path):
    recipe = own_recipe(tmp_path / "own.json", sample_size=28, in_channels=3, out_channels=3, num_classes=3)
    found = loaded(grey, "--recipe", recipe)
    assert found.images.shape == (12, 3, 28, 28)
    assert f"3 channels (grey, repeated for {recipe})" in found.found


def test_a_network_to_start_from_keeps_its_channels(colour, grey):
    with pytest.raises(ValueError, match="holds colour, which --init mnist would lose") as error:
        loaded(colour, "--recipe", "mnist", "--init", "mnist")
    assert "drop it by --set unet.in_channels=1" in str(error.value)
    assert "in_channels=3" not in str(error.value)  # another architecture
    found = loaded(grey, "--recipe", "mnist", "--init", "mnist")
    assert found.recipe.unet["num_classes"] == 3
    assert channels_of(found) == (1, 1)


def test_a_recipe_without_labels_stays_one(colour):
    for words in (("--recipe", "mnist-unconditional"), ("--recipe", "mnist", "--unconditional")):
        found = loaded(colour, *words)
        assert found.recipe.unet.get("num_classes") is None
        assert found.labels is None
        assert found.found.endswith("3 channels (the recipe had 1), labels are not used")


def test_images_without_labels_are_refused_with_a_way_out(colour):
    for path in list(colour.glob("*/*.png")):
        path.rename(colour / f"{path.parent.name}{path.name}")
    for name in ("cat", "dog", "eel"):
        (colour / name).rmdir()
    with pytest.raises(ValueError, match=r"needs labels, which .* does not have: .*--unconditional"):
        loaded(colour, "--recipe", "mnist")
    assert loaded(colour, "--recipe", "mnist", "--unconditional").found.endswith(", no labels")


def test_another_size_is_told_and_scaled_where_it_is_asked_for(tmp_path):
    folder = make_images(tmp_path / "large", size=40)
    with pytest.raises(ValueError, match=r"40 x 40, and the recipe is for 28 x 28: add --resize.* or --set"):
        loaded(folder, "--recipe", "mnist")
    assert "28 x 28 (the middle square, scaled)" in loaded(folder, "--recipe", "mnist", "--resize").found
    assert "40 x 40," in loaded(folder, "--recipe", "mnist", "--set", "unet.sample_size=40").found


def test_listed_labels_reach_to_the_largest(colour):
    label_by_list(colour, [0, 4, 2])
    found = loaded(colour, "--recipe", "mnist")
    assert found.recipe.unet["num_classes"] == 5
    assert found.found.endswith("5 classes (the recipe had 10); no images of 1, 3")
    with pytest.raises(ValueError, match=r"has 5 classes, but unet\.num_classes is 10 in --set"):
        loaded(colour, "--recipe", "mnist", "--set", "unet.num_classes=10")


def test_many_classes_and_their_names_are_one_line(tmp_path):
    names = [f"{k:02d} a\nb" for k in range(12)]
    folder = make_images(tmp_path / "many", classes=names, count=1)
    line = loaded(folder, "--recipe", "mnist").found
    assert line.endswith(
        "12 classes (the recipe had 10): " + ", ".join(f"{k:02d} a b" for k in range(10)) + ", ..."
    )


def test_validation_images_are_labelled_by_the_names_of_the_training_data(colour, tmp_path):
    part = make_images(tmp_path / "part", classes=("dog", "eel"), count=2)
    found = loaded(colour, "--recipe", "mnist", "--validation-data", part)
    assert found.validation[1].tolist() == [1, 1, 2, 2]
    assert found.validation[0].shape == (4, 3, 28, 28)
    (part / "dog").rename(part / "fox")
    with pytest.raises(ValueError, match=r"part has a class fox, which .*colour lacks"):
        loaded(colour, "--recipe", "mnist", "--validation-data", part)


@pytest.mark.skipif(not torchvision_works(), reason="the data set is read by torchvision")
def test_named_sets_are_what_they_are():
    found = loaded("mnist", "--data-dir", DATA)
    assert found.recipe == load_recipe("mnist")
    assert found.found == (
        "mnist, train split: 256 images, 28 x 28, 1 channel, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    )
    words = ("--recipe", "cifar10-ddpm", "--set", "unet.sample_size=28", "unet.channel_mult=[1,2]")
    fitted = loaded("mnist", "--data-dir", DATA, *words)
    assert channels_of(fitted) == (1, 1)
    for change, expected in (
        (
            "unet.in_channels=3 unet.out_channels=3",
            "mnist has 1 channel, but unet.in_channels is 3 in --set",
        ),
        ("unet.num_classes=12", "has 10 classes"),
        ("unet.sample_size=32", "28 x 28, and the recipe is for 32 x 32: add --set unet.sample_size=28"),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)):
            loaded("mnist", "--data-dir", DATA, "--set", *change.split())


def test_the_command_says_what_it_found_and_resumes_what_it_began(tmp_path, capsys):
    folder, out = make_images(tmp_path / "images", size=8), tmp_path / "run"
    recipe = tmp_path / "own.json"
    unet = {name: value for name, value in RECIPE.unet.items() if name not in ("in_channels", "out_channels")}
    recipe.write_text(json.dumps({"unet": unet, "steps": 2, "batch_size": 4}))
    words = ["train", "--data", str(folder), "--recipe", str(recipe), "--out", str(out)]
    main(words)
    line = capsys.readouterr().out.splitlines()[0]
    found = f"{folder}: 12 images, 8 x 8, 3 channels, 3 classes: cat, dog, eel; "
    assert re.fullmatch(re.escape(found) + r"recipe .*own\.json: [\d,]+ parameters, 2 steps of 4 .*", line)
    model = diffusion.load(out)
    assert (model.num_classes, model.unet.config.in_channels) == (3, 3)
    # The run keeps its classes and channels when the data lose some, which has to be accepted.
    shutil.rmtree(folder / "eel")
    for path in folder.glob("*/*.png"):
        Image.open(path).convert("L").save(path)
    main([*words, "--resume", "--accept-changes", "--steps", "3"])
    assert diffusion.load(out).metadata["training"]["step"] == 3
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(
        f"{folder}: 8 images, 8 x 8, 3 channels, 3 classes: cat, dog, eel; no images of eel"
    )


@pytest.mark.skipif(not torchvision_works(), reason="the data set is read by torchvision")
def test_a_run_that_began_with_labels_that_no_image_has_resumes(tmp_path, monkeypatch):
    """An older release took ten classes for data of three; the state keeps them."""
    folder, out = make_images(tmp_path / "images", mode="L"), tmp_path / "run"
    label_by_list(folder, [0, 1, 2])
    monkeypatch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)
    words = ["train", "--data", str(folder), "--recipe", "mnist", "--out", str(out), "--batch-size", "4"]
    words += [
        "--steps",
        "1",
        "--set",
        "unet.channels=16",
        "unet.channel_mult=[1]",
        "unet.attention_levels=[]",
    ]
    with monkeypatch.context() as patch:
        patch.setattr("diffusion.cli.training_data.with_classes", lambda recipe, *rest: recipe)
        main(words)
    assert diffusion.load(out).num_classes == 10
    main([*words, "--resume"])
    assert diffusion.load(out).num_classes == 10
    assert torch.isfinite(diffusion.load(out).sample(labels=[2], steps=2)).all()


def test_a_named_set_is_one_entry(tmp_path, monkeypatch):
    """A line in NAMED_SETS is enough for a new data set."""
    images = torch.randint(
        0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    asked = []

    def load(data_dir, split, download):
        asked.append((data_dir, split, download))
        return images, torch.arange(8) % 2

    monkeypatch.setitem(NAMED_SETS, "svhn", NamedSet(load, ("zero", "one"), (3, 8, 8)))
    words = ["train", "--data", "svhn", "--out", str(tmp_path / "run"), "--steps", "1", "--batch-size", "4"]
    words += ["--set", "unet.sample_size=8", "unet.channels=32", "unet.channel_mult=[1,2]"]
    words += ["unet.attention_levels=[]", "unet.num_res_blocks=1"]
    main([*words, "--data-dir", str(tmp_path), "--recipe", "mnist"])
    assert asked == [(str(tmp_path), "train", False), (str(tmp_path), "test", False)]
    model = diffusion.load(tmp_path / "run")
    assert (model.unet.config.in_channels, model.num_classes) == (3, 2)
    found = load_dataset("svhn", split="test", data_dir=tmp_path)
    assert (found.classes, found.name) == (("zero", "one"), "svhn, test split")
    assert torch.equal(found.images, images)
