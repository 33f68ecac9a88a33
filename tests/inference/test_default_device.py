"""torch.set_default_device changes nothing here: a tensor is where its inputs, or an argument, say it is.

"meta" stands for "cuda", so that the tests need none: a tensor made there by mistake has no values.
"""

import ast
from dataclasses import replace
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

import diffusion
from diffusion import DDPM, NoiseSchedule
from diffusion.classifier import balanced_labels, classify, load_classifier
from diffusion.classifier.training import augment, train_classifier
from diffusion.evaluation.likelihood import bits_per_dimension
from diffusion.evaluation.shards import sample_shards
from diffusion.kernels import philox_normal, step_counter
from diffusion.process.objective import drop_labels
from diffusion.samplers import SAMPLERS
from diffusion.samplers.timesteps import SPACINGS, spaced_timesteps
from diffusion.training.state import load_state, save_state
from diffusion.utils.frechet import frechet_distance, moments
from helpers.models import make_model
from helpers.samplers import CLIPPED_OUTPUT, VARIANTS
from helpers.thinning import exhaustive_but
from helpers.training import RECIPE, make_trainer

ROOT = Path(diffusion.__file__).parent.parent


@pytest.fixture
def unchanged():
    """Asserts that a function gives the same numbers, on the CPU, with another default device."""

    def check(compute):
        expected = compute()
        torch.set_default_device("meta")
        try:
            found = compute()
        finally:
            torch.set_default_device(None)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        return found

    yield check
    torch.set_default_device(None)


@pytest.mark.thinned
@pytest.mark.parametrize("make", ["linear", "scaled_linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_schedules(unchanged, make, zero_snr):
    def compute():
        schedule = getattr(NoiseSchedule, make)(50)
        schedule = schedule.rescale_zero_terminal_snr() if zero_snr else schedule
        again = NoiseSchedule.from_config(schedule.to_config())
        listed = NoiseSchedule.from_betas(schedule.betas.tolist())
        return [schedule.betas, schedule.alphas_cumprod, again.alphas_cumprod, listed.alphas_cumprod]

    unchanged(compute)


@pytest.mark.thinned
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("sampler", "options"), [*VARIANTS, CLIPPED_OUTPUT], ids=str)
def test_tables(unchanged, sampler, options, spacing):
    unchanged(lambda: spaced_timesteps(1000, 7, spacing))
    for steps in (1, 7, None):
        guidance = {"guidance_scale": 3.0, "guidance_interval": (200, 700)}
        unchanged(
            lambda steps=steps, guidance=guidance: (
                SAMPLERS[sampler](NoiseSchedule.linear(), steps, spacing=spacing, **guidance, **options).table
            )
        )


def test_a_loaded_model_samples_the_same_images(unchanged):
    def compute():
        model = diffusion.load("mnist")
        weights = dict(model.unet.state_dict())
        images = [
            model.sample([3, 1], steps=2, guidance_scale=2.0, sampler=sampler, device=device)
            for sampler, device in [("ddpm", None), ("ddim", "cpu"), ("dpm++", torch.device("cpu"))]
        ]
        return weights, images

    _, images = unchanged(compute)
    assert images[0].device.type == "cpu"


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_all_ways_to_sample(unchanged, backend):
    model = make_model(10, learned_variance=True)

    def compute():
        return [
            model.sample(num_samples=3, steps=3, backend=backend),
            model.sample(
                np.array([1, 2]), steps=3, backend=backend, guidance_scale=2.0, guidance_rescale=0.5
            ),
            model.sample(
                1, num_samples=2, sample_ids=[5, 9], steps=3, backend=backend, dynamic_threshold=0.9
            ),
            model.sample(1, sampler="dpm++", sde=True, steps=3, backend=backend, batch_size=1),
            model.sample(1, steps=3, backend=backend, noise=lambda k: torch.ones(1, 2, 8, 8, device="cpu")),
            model.sample(1, steps=3, backend=backend, dtype="bfloat16"),
        ]

    unchanged(compute)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_noise_and_counters(unchanged, backend):
    unchanged(lambda: philox_normal((3, 5), seed=1, backend=backend))
    unchanged(lambda: philox_normal((2, 5), seed=1, sample_ids=[7, 2**40], backend=backend))
    unchanged(lambda: step_counter(5))


def test_saving_and_loading(unchanged, tmp_path):
    model = make_model(3)

    def compute():
        model.save(tmp_path / "model")
        return dict(DDPM.state_dict(diffusion.load(tmp_path / "model")))

    unchanged(compute)


def test_a_model_of_diffusers(unchanged, tmp_path):
    diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
        ),
        diffusers.DDPMScheduler(50, beta_schedule="squaredcos_cap_v2"),
    ).save_pretrained(tmp_path)

    def compute():
        model = diffusion.load(tmp_path)
        return dict(model.unet.state_dict()), model.schedule.betas

    unchanged(compute)


def test_shards(unchanged, tmp_path):
    model = make_model(3)

    def compute():
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        sample_shards(model, folder, num=3, shard_size=2, steps=2)
        return [torch.from_numpy(np.load(path)["images"]) for path in sorted(folder.glob("*.npz"))]

    unchanged(compute)


def test_loss_and_likelihood(unchanged):
    model = make_model(3, learned_variance=True, T=20)
    images = torch.arange(2 * 2 * 64, dtype=torch.uint8).reshape(2, 2, 8, 8)
    x0, labels = images / 127.5 - 1, torch.tensor([0, 2])

    def compute():
        torch.manual_seed(0)
        losses = [
            model.loss(x0, labels, label_dropout=0.5, weighting=weighting)
            for weighting in ("uniform", "min_snr", "p2", "truncated_snr", "snr_plus_one")
        ]
        return [*losses, drop_labels(labels, 0.5, 3), bits_per_dimension(model, images, labels)]

    unchanged(compute)


def test_evaluation(unchanged):
    images = torch.arange(4 * 784, dtype=torch.uint8).reshape(4, 1, 28, 28)

    def compute():
        judge, reference = load_classifier()
        features, read = classify(judge, images)
        torch.manual_seed(0)
        moved = augment(images / 255.0)
        identity = torch.eye(3, device="cpu")
        distance = frechet_distance(
            [0.0, 1.0, 0.0], identity.tolist(), torch.zeros(3, device="cpu"), identity
        )
        trained = train_classifier(images, torch.arange(4, device="cpu"), epochs=1, batch_size=2)
        numbers = [*moments(features), reference.mean, balanced_labels(20, 10), distance]
        return [trained.state_dict(), features, read, moved, *numbers]

    unchanged(compute)


@pytest.mark.parametrize("optimizer", exhaustive_but(["adam", "adamw", "muon"], default=["adam", "muon"]))
def test_training(unchanged, tmp_path, optimizer):
    recipe = replace(RECIPE, optimizer=optimizer, horizontal_flip=True)
    data = make_trainer(recipe)

    def compute():
        trainer = type(data)(recipe, data.images, data.labels, data.validation)
        trainer.train_step()
        save_state(trainer, tmp_path / "state.safetensors")
        resumed = type(data)(recipe, data.images, data.labels, data.validation)
        load_state(resumed, tmp_path / "state.safetensors")
        resumed.train_step()
        return dict(resumed.model.state_dict()), resumed.validation_loss()

    unchanged(compute)


def test_every_tensor_is_made_on_a_device_that_is_named():
    # A module's own parameters are the exception: where they are made is PyTorch's business, and the user's.
    makers, found = {maker.__name__ for maker in _device_constructors()}, []
    for path in [*ROOT.glob("diffusion/**/*.py"), *ROOT.glob("kernels/**/*.py")]:
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in {f"torch.{name}" for name in makers}:
                named = any(keyword.arg in ("device", None) for keyword in call.keywords)  # or **options
                if not named and path.parent.name != "models":
                    found.append(f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)}")
    assert found == []
