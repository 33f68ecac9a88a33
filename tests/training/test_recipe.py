"""Recipes: those of the package, files, changes on the command line, and nonsense."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from diffusion import NoiseSchedule, UNet, UNetConfig
from diffusion.cli import main
from diffusion.training.recipe import RECIPES, Recipe, changed, load_recipe, recipe_from
from helpers.paths import ROOT
from helpers.work import size_and_flops


def test_the_recipes_of_the_package():
    names = ["cifar10", "cifar10-ddpm", "cifar10-unconditional", "mnist", "mnist-unconditional"]
    assert list(RECIPES) == [*names, "small-32", "small-64"]
    for name in RECIPES:
        recipe = load_recipe(name)
        assert recipe.unet.get("num_classes") == (None if "unconditional" in name else 10)
        assert bool(recipe.label_dropout) == ("unconditional" not in name)


@pytest.mark.parametrize("name", ["cifar10-ddpm", "cifar10-unconditional"])
def test_the_recipes_of_ddpm(name):
    """Ho et al. 2020, appendix B: 35.7 million parameters, T = 1000, 800k steps of 128, 2e-4, EMA 0.9999."""
    recipe = load_recipe(name)
    unet = UNet(UNetConfig.from_dict(recipe.unet | {"num_classes": None}))
    assert sum(p.numel() for p in unet.parameters()) == 35_746_307  # as in google/ddpm-cifar10-32
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


def test_the_size_of_cifar10_is_what_its_page_says():
    recipe = load_recipe("cifar10")
    parameters, flops = size_and_flops(UNetConfig.from_dict(recipe.unet))
    page = " ".join((ROOT / "docs" / "cifar10.md").read_text().split())
    for said in (
        f"{parameters / 1e6:.2f} million parameters",
        f"{flops / 1e9:.2f} GFLOP",
        f"{recipe.steps:,} steps of {recipe.batch_size} images",
        f"{3 * flops * recipe.batch_size * recipe.steps:.1e} FLOP",
    ):
        assert said in page, said


def test_the_learning_rate_falls_at_the_end():
    """20 steps of warm-up, then 80 constant ones and 20 that fall: 20 % of the 100 after the warm-up."""
    recipe = Recipe(steps=120, learning_rate=1.0, warmup_steps=20, decay_fraction=0.2)
    rates = [recipe.learning_rate_at(step) for step in range(120)]
    assert rates[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert rates[20:101] == [1.0] * 81
    assert rates[100:] == pytest.approx([(120 - step) / 20 for step in range(100, 120)])
    whole = replace(recipe, decay_fraction=1.0)
    assert whole.learning_rate_at(70) == pytest.approx(0.5)
    assert replace(recipe, learning_rate_decay="constant").learning_rate_at(119) == 1.0


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
        ('{"steps": "many"}', "steps must be a whole number in 1\\.\\.1000000000, not 'many'"),
        ('{"steps": 1.5}', "steps must be a whole number"),
        ('{"steps": true}', "steps must be a whole number"),
        ('{"horizontal_flip": 1}', "horizontal_flip must be true or false"),
        ('{"steps": 1%s}' % ("0" * 400), "steps must be a whole number in 1"),
        ('{"batch_size": 4611686018427387904}', "batch_size must be a whole number in 1"),
        ('{"learning_rate": NaN}', r"learning_rate must be a number in \(0, 3.4e38\], not nan"),
        ('{"learning_rate": 1e308}', "learning_rate must be a number in"),
        ('{"learning_rate": 1%s}' % ("0" * 400), "learning_rate must be a number in"),
        ('{"learning_rate": "0.1"}', "learning_rate must be a number in"),
        ('{"more_ema_decays": 0.5}', "more_ema_decays must be a list"),
        ('{"more_ema_decays": [0.5, 0.5]}', "different"),
        ('{"stpes": 5}', "unknown field of a recipe 'stpes'; choose from: unet, "),
        ('{"unet": {"chanels": 5}}', "unknown UNet option 'chanels'"),
        ('{"unet": []}', "unet must be a dictionary"),
        ('{"schedule": {"kind": "cubic"}}', "kind of schedule"),
        ('{"prediction_type": "score"}', "prediction type"),
        ('{"loss_weighting": "p3"}', "loss weighting 'p3'"),
        ('{"optimizer": "sgd"}', "unknown optimizer 'sgd'; choose from: adam, adamw, muon"),
        ('{"weight_decay": 0.1}', "adamw and muon take one"),
        ('{"seed": -1}', "seed"),
        ('{"unet": {"num_res_blocks": 1%s}}' % ("0" * 30), "num_res_blocks must be a whole number in 1"),
        ('{"unet": {"channels": 65536}}', r"has [0-9,]+ parameters, more than 17,179,869,184"),
        ('{"unet": {"out_channels": 5}}', "out_channels must be 3, or 6 for a learned variance, not 5"),
        ('{"unet": {"num_classes": 3, "has_null_label": false}}', "label_dropout must be 0"),
        ('{"unet": {"time_embedding": "fourier"}}', "timestep 0 has no logarithm"),
        ('{"unet": {"label_embedding": "identity"}}', "data sets have whole labels"),
        (
            '{"unet": {"time_embedding": "learned", "learned_timesteps": 999}}',
            "learned_timesteps must be at least the schedule's 1000, not 999",
        ),
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
def test_texts_that_are_not_changes(change):
    with pytest.raises(ValueError, match=r"is not a change|unknown field"):
        changed(Recipe(), [change])


def test_changes_of_what_is_no_longer_a_dictionary():
    with pytest.raises(ValueError, match="unet must be a dictionary, not 3"):
        changed(Recipe(), ["unet=3", "unet.channels=4"])


def test_numbers_of_numpy_and_torch_become_plain():
    recipe = Recipe(
        unet={
            "channels": np.int64(64),
            "channel_mult": np.array([1, 2]).tolist(),
            "norm_eps": np.float32(0.5),
        },
        schedule={"kind": "cosine", "T": np.int64(10), "s": np.float64(0.25), "max_beta": torch.tensor(0.5)},
        steps=np.int64(7),
        learning_rate=torch.tensor(0.125),
        more_ema_decays=[np.float64(0.5)],
    )
    assert recipe_from(json.loads(recipe.to_json())) == recipe
    assert json.loads(recipe.to_json())["unet"] == {"channels": 64, "channel_mult": [1, 2], "norm_eps": 0.5}
    assert (recipe.steps, recipe.learning_rate, recipe.more_ema_decays) == (7, 0.125, (0.5,))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"ema_decay": 1.0},
        {"more_ema_decays": (1.5,)},
        {"decay_fraction": 0.0},
        {"decay_fraction": 1.1},
    ],
)
def test_numbers_out_of_range(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(Recipe(), **change)
