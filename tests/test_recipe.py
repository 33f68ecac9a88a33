"""Recipes: those of the package, files, changes on the command line, and nonsense."""

import json
from dataclasses import asdict, replace

import pytest

from diffusion import NoiseSchedule, UNet, UNetConfig
from diffusion.cli import main
from diffusion.recipe import RECIPES, Recipe, changed, load_recipe


def test_the_recipes_of_the_package():
    assert RECIPES == ("cifar10", "cifar10-unconditional", "mnist", "mnist-unconditional")
    for name in RECIPES:
        recipe = load_recipe(name)
        assert recipe.unet.get("num_classes") == (None if "unconditional" in name else 10)
        assert bool(recipe.label_dropout) == ("unconditional" not in name)


def test_cifar10_is_ddpms():
    """Ho et al. 2020, appendix B: 35.7 million parameters, T = 1000, 800k steps of 128, 2e-4, EMA 0.9999."""
    recipe = load_recipe("cifar10-unconditional")
    unet = UNet(UNetConfig.from_dict(recipe.unet))
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307  # that of google/ddpm-cifar10-32
    assert NoiseSchedule.from_config(recipe.schedule).betas.tolist() == NoiseSchedule.linear().betas.tolist()
    expected = {
        "steps": 800_000,
        "batch_size": 128,
        "learning_rate": 2e-4,
        "warmup_steps": 5000,
        "ema_decay": 0.9999,
        "gradient_clip": 1.0,
        "horizontal_flip": True,
        "prediction_type": "epsilon",
    }
    assert {name: getattr(recipe, name) for name in expected} == expected
    assert recipe.learning_rate_at(799_999) == 2e-4
    assert recipe.learning_rate_at(0) == pytest.approx(2e-4 / 5001)


@pytest.mark.parametrize("name", RECIPES)
def test_show_prints_what_recipe_reads(name, tmp_path, capsys):
    main(["train", "--recipe", name, "--show"])
    path = tmp_path / "mine.json"
    path.write_text(capsys.readouterr().out)
    assert load_recipe(path) == load_recipe(name)
    words = ["--set", "unet.channels=32", "loss_weighting=min_snr", "more_ema_decays=[0.5]", "--steps", "7"]
    main(["train", "--recipe", str(path), "--show", *words])
    shown = json.loads(capsys.readouterr().out)
    before = asdict(load_recipe(name))
    assert shown.pop("unet") == before.pop("unet") | {"channels": 32}
    changes = {"loss_weighting": "min_snr", "more_ema_decays": [0.5], "steps": 7}
    assert shown == json.loads(json.dumps(before | changes))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ("[1]", "JSON object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"steps": "many"}', "steps must be a whole number, not 'many'"),
        ('{"steps": 1.5}', "steps must be a whole number"),
        ('{"steps": true}', "steps must be a whole number"),
        ('{"horizontal_flip": 1}', "horizontal_flip must be true or false"),
        ('{"learning_rate": NaN}', "learning_rate must be a finite number"),
        ('{"more_ema_decays": 0.5}', "more_ema_decays must be a list"),
        ('{"more_ema_decays": [0.5, 0.5]}', "different"),
        ('{"stpes": 5}', "no field 'stpes'"),
        ('{"unet": {"chanels": 5}}', "unknown UNet option 'chanels'"),
        ('{"unet": []}', "unet must be an object"),
        ('{"schedule": {"kind": "cubic"}}', "kind of schedule"),
        ('{"prediction_type": "score"}', "prediction type"),
        ('{"loss_weighting": "p3"}', "loss weighting 'p3'"),
        ('{"optimizer": "sgd"}', "optimizer must be adam or adamw"),
        ('{"weight_decay": 0.1}', "adamw takes one"),
        ('{"seed": -1}', "seed"),
        ('{"unet": {"out_channels": 5}}', "out_channels must be 3, or 6 for a learned variance, not 5"),
        ('{"unet": {"num_classes": 3, "has_null_label": false}}', "label_dropout must be 0"),
        (
            '{"prediction_type": "epsilon", "schedule": {"kind": "betas", "betas": [0.1, 1.0]}}',
            "zero",
        ),
    ],
)
def test_files_that_are_no_recipe(text, expected, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        load_recipe(path)
    assert "mine.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_recipes_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="unknown recipe 'imagenet'; choose from: cifar10, "):
        load_recipe("imagenet")
    with pytest.raises(ValueError, match=r"none\.json is missing"):
        load_recipe(tmp_path / "none.json")


@pytest.mark.parametrize("change", ["steps", "=3", "unet.=3", "unet.a.b=3", "steps.x=3", "no_field=3"])
def test_changes_that_are_none(change):
    with pytest.raises(ValueError, match=r"is no change|no field"):
        changed(Recipe(), [change])


@pytest.mark.parametrize("change", [{"steps": 0}, {"ema_decay": 1.0}, {"more_ema_decays": (1.5,)}])
def test_numbers_out_of_range(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(Recipe(), **change)
