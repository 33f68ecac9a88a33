"""The bundled model: its size, and the class accuracy of its digits."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

import diffusion
from diffusion.classifier import classify, load_classifier
from diffusion.cli import main
from diffusion.samplers import EVALUATE_TWICE, SAMPLERS
from diffusion.storage.checkpoint import BUNDLED
from diffusion.storage.images import to_uint8
from diffusion.training.recipe import load_recipe
from diffusion.training.trainer import SAMPLER_OPTIONS
from helpers.paths import ROOT


@pytest.fixture(scope="module")
def mnist():
    return diffusion.load("mnist")


def test_it_is_small_and_made_by_the_recipe(mnist):
    assert (BUNDLED / "mnist" / "model.safetensors").stat().st_size <= 8e6
    training = mnist.metadata["training"]
    recipe = load_recipe("mnist")
    assert training["step"] == training["steps"] == recipe.steps
    for name in ("unet", "schedule", "prediction_type", "batch_size", "learning_rate", "ema_decay", "seed"):
        assert training[name] == getattr(recipe, name)
    assert mnist.sampler_options == SAMPLER_OPTIONS  # those of all models that are trained here


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_starts_at_the_last_timestep(sampler, mnist):
    assert mnist.steps(sampler, 5).timesteps[0] == 999


@pytest.mark.parametrize("folder", sorted(path.parent for path in BUNDLED.glob("*/config.json")))
def test_every_file_is_the_one_of_its_digest(folder):
    config = json.loads((folder / "config.json").read_text())
    files = {"weights_sha256": "model.safetensors", "statistics_sha256": "statistics.safetensors"}
    digests = {
        key: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for key, name in files.items()
        if (folder / name).exists()
    }
    assert digests == {key: value for key, value in config.items() if key.endswith("sha256")}
    assert "weights_sha256" in digests


@pytest.mark.exhaustive  # by default, the next test draws digits of every sampler
@pytest.mark.parametrize(("count", "right"), [(20, 18), (100, 96)])
def test_class_accuracy(count, right, mnist):
    """A part of the samples of `diffusion evaluate`, where the target is 98 % of 1,000."""
    labels = [i % 10 for i in range(count)]
    x = mnist.sample(labels, guidance_scale=2.0, sampler="ddim", steps=50)
    classifier, _ = load_classifier()
    _, digits = classify(classifier, to_uint8(x))
    assert (digits == torch.tensor(labels)).sum() >= right


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_draws_the_digits_asked_for(sampler, mnist):
    """As few as 9 evaluations are enough for 18 of 20, as they are for the model's own sampler."""
    labels = [i % 10 for i in range(20)]
    steps = 5 if sampler in EVALUATE_TWICE else 9
    x = mnist.sample(labels, sampler=sampler, steps=steps)
    _, digits = classify(load_classifier()[0], to_uint8(x))
    assert (digits == torch.tensor(labels)).sum() >= 18


def test_the_first_lines_of_the_readme(mnist, tmp_path):
    x = mnist.sample(labels=[3, 1, 4], guidance_scale=3.0, sampler="ddim", steps=50, seed=0)
    assert x.shape == (3, 1, 28, 28)
    assert x.dtype == torch.float32
    assert x.min() >= -1
    assert x.max() <= 1
    diffusion.save_grid(x, tmp_path / "digits.png")


def test_the_readmes_picture_is_what_its_first_command_draws(tmp_path):
    main(["sample", "--out", str(tmp_path / "digits.png")])
    committed = np.asarray(Image.open(ROOT / "docs" / "digits.png"), dtype=float)
    drawn = np.asarray(Image.open(tmp_path / "digits.png"), dtype=float)
    assert drawn.shape == committed.shape
    # Another processor sums in another order, and rounding to bytes can then fall the other way.
    assert np.abs(drawn - committed).mean() < 0.5


@pytest.mark.parametrize(
    "steps", [334, *(pytest.param(count, marks=pytest.mark.slow) for count in (500, 501, 600))]
)
def test_ddim_leaves_no_noise_where_steps_do_not_divide_T(mnist, steps):
    """Digits leave the frame of three pixels black, but for 1 %: with noise left in them, 60 % are grey."""
    x = mnist.sample([0, 7], guidance_scale=1.0, sampler="ddim", steps=steps)
    frame = torch.ones(28, 28, dtype=torch.bool)
    frame[3:-3, 3:-3] = False
    assert (x[..., frame] > -0.9).double().mean() < 0.01


@pytest.fixture(scope="module")
def cifar10():
    return diffusion.load("cifar10")


def test_cifar10_is_small_and_made_by_its_recipe(cifar10):
    assert (BUNDLED / "cifar10" / "model.safetensors").stat().st_size <= 20e6
    recipe, training = load_recipe("cifar10"), cifar10.metadata["training"]
    for name in ("schedule", "prediction_type", "batch_size", "optimizer", "learning_rate", "seed"):
        assert training[name] == getattr(recipe, name)
    assert cifar10.unet.config == diffusion.UNetConfig(**recipe.unet)
    assert cifar10.sampler_options == SAMPLER_OPTIONS


@pytest.mark.parametrize(
    ("count", "right"),
    [pytest.param(10, 6, marks=pytest.mark.slow), pytest.param(100, 72, marks=pytest.mark.exhaustive)],
)
def test_class_accuracy_of_cifar10(count, right, cifar10):
    """A part of the samples of `diffusion evaluate --model cifar10`, where the target is 80 % of 1,000.

    Of a model that reaches it, fewer than 6 of 10 are right in 3 % of cases, fewer than 72 of 100 in 2 %.
    """
    labels = [i % 10 for i in range(count)]
    x = cifar10.sample(labels, precision="fast")
    classifier, _ = load_classifier("cifar10-classifier")
    assert (classify(classifier, to_uint8(x))[1] == torch.tensor(labels)).sum() >= right


def test_cifar10_samples_without_labels_and_by_names(cifar10):
    x = cifar10.sample(num_samples=2, steps=3, seed=0)
    assert x.shape == (2, 3, 32, 32)
    named = cifar10.sample(labels=["cat", "ship"], steps=3, seed=0)
    assert torch.equal(named, cifar10.sample(labels=[3, 8], steps=3, seed=0))
    assert not torch.equal(named, x)
