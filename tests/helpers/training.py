"""A small recipe, its trainer on made-up squares, and runs of it."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from diffusion.training.loop import train
from diffusion.training.recipe import Recipe
from diffusion.training.trainer import Trainer
from helpers.paths import FIXTURES

DATA = FIXTURES
RECIPE = Recipe(
    unet={
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "channels": 8,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_levels": [],
        "norm_groups": 4,
        "dropout": 0.1,
        "num_classes": 3,
    },
    steps=12,
    batch_size=8,
    warmup_steps=3,
    ema_decay=0.9,
)
PLAIN = replace(RECIPE, unet=RECIPE.unet | {"dropout": 0.0})


def make_trainer(recipe: Recipe = RECIPE, **options) -> Trainer:
    """A trainer on 44 bright and dark squares, so that epochs end within a run and leave images over."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(44) % 3
    images = (labels * 100).reshape(-1, 1, 1, 1) + torch.randint(0, 50, (44, 1, 8, 8), generator=generator)
    images = images.to(torch.uint8)
    if recipe.unet["num_classes"] is None:
        labels = None
    validation = (images[:10], None if labels is None else labels[:10])
    return Trainer(recipe, images, labels, validation, **options)


def run(out, trainer=None, **options):
    options = {"log_every": 2, "save_every": 5, "sample_every": 100, "validate_every": 4} | options
    return train(trainer or make_trainer(), out, progress=False, **options)


def take_time(
    trainer: Trainer, clock: list[float], seconds: float = 1.0, first: float | None = None
) -> Trainer:
    """The trainer, each step of which, and the first one, moves the clock by so many seconds."""
    train_step = trainer.train_step

    def step():
        clock[0] += seconds if trainer.step or first is None else first
        return train_step()

    trainer.train_step = step
    return trainer


def run_by(clock: list[float]) -> SimpleNamespace:
    """What takes the place of the module `time` in diffusion/training/run.py."""
    return SimpleNamespace(perf_counter=lambda: clock[0])


def run_until(step: int, out, trainer=None):
    """A run that fails after so many steps."""
    trainer = trainer or make_trainer()
    train_step = trainer.train_step

    def fails_after_them():
        if trainer.step == step:
            raise RuntimeError("power cut")
        return train_step()

    trainer.train_step = fails_after_them
    with pytest.raises(RuntimeError, match="power cut"):
        run(out, trainer)


def state_of(out) -> dict[str, torch.Tensor]:
    return load_file(out / "state.safetensors")


def about(out) -> dict:
    """The entries of a state other than tensors, without the time and the losses not yet logged."""
    with safe_open(out / "state.safetensors", framework="pt") as file:
        found = json.loads(file.metadata()["training"])
    return {key: value for key, value in found.items() if key not in ("seconds", "losses", "norms")}


def assert_same_run(a, b):
    assert about(a) == about(b)
    first, second = state_of(a), state_of(b)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    logs = [list(csv.reader((out / "log.csv").open())) for out in (a, b)]
    assert [row[:-1] for row in logs[0]] == [row[:-1] for row in logs[1]]  # but for the seconds
    models = [load_file(out / "model.safetensors") for out in (a, b)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def torchvision_works() -> bool:
    try:
        import torchvision.datasets  # noqa: F401
    except Exception:  # RuntimeError, beside a torch it was not built for
        return False
    return True
