"""Inversion: noise whose samples are the images; and noise between two noises."""

import math

import diffusers
import numpy as np
import pytest
import torch

import diffusion
from diffusion.inference.batches import Interrupted
from helpers.models import make_model


@pytest.fixture
def images():
    return torch.rand(2, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_one_iteration_is_that_of_diffusers(images):
    model, steps = make_model(), 20
    theirs = diffusers.DDIMInverseScheduler(num_train_timesteps=1000, beta_end=0.02, clip_sample=False)
    theirs.set_timesteps(steps)
    x = images
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(model.unet(x, t.expand(2), None), t, x).prev_sample
    found = model.invert(images, steps=steps, iterations=1)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_iterations_solve_each_step_in_float64(images):
    """x = (x' - q out(x)) / p, by as many iterations from x = x'; and its samples are the images."""
    model, steps, iterations = make_model(), 10, 4
    double = model.copy().double().unet
    signal, x = model.schedule.alphas_cumprod.tolist(), images.double()
    for t in range(0, 1000, 100):
        here, there = signal[t], signal[t - 100] if t else 1.0
        p = math.sqrt(there / here)
        q = math.sqrt(1 - there) - math.sqrt(there * (1 - here) / here)
        solution = x
        for _ in range(iterations):
            with torch.no_grad():
                solution = (x - q * double(solution, torch.tensor([t, t]), None)) / p
        x = solution
    found = model.invert(images, steps=steps, iterations=iterations)
    torch.testing.assert_close(found.double(), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"spacing": "trailing"}, {"guidance_scale": 1.5}], ids=str)
def test_samples_of_the_noise_are_the_images(conditional, options, images):
    noise = conditional.invert(images, [3, 7], steps=25, iterations=30, batch_size=1, **options)
    again = conditional.sample([3, 7], noise=noise, sampler="ddim", steps=25, clip=None, **options)
    torch.testing.assert_close(again, images, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("given", [False, True], ids=["own", "argument"])
def test_guidance_of_every_kind_is_inverted(given, images):
    """Samples of the noise are the images where inversion guides as sampling does."""
    guidance = {"guidance_rescale": 0.7, "guidance_parallel": 0.25}
    model = make_model(10, guidance_scale=2.0, **({} if given else guidance))
    how = guidance if given else {}
    noise = model.invert(images, [3, 7], steps=25, iterations=30, **how)
    again = model.sample([3, 7], noise=noise, sampler="ddim", steps=25, clip=None, **how)
    torch.testing.assert_close(again, images, rtol=1e-3, atol=1e-3)


def test_the_recipe_holds_where_the_model_samples_with_noise(images):
    model = make_model(sampler_options={"ddim": {"eta": 1.0}})
    noise = model.invert(images, steps=25, iterations=30)
    again = model.sample(noise=noise, sampler="ddim", steps=25, clip=None, eta=0)
    torch.testing.assert_close(again, images, rtol=1e-3, atol=1e-3)


def test_interrupted_inversion_has_the_noise_of_the_finished_images():
    """Noise is neither clipped nor mapped to the range of images."""
    model = make_model(value_range=(0, 1), clip_output=True)
    images = torch.rand(2, 2, 8, 8)
    options = {"steps": 4, "batch_size": 1}
    whole, calls = model.invert(images, **options), []

    def stop(*arguments):
        calls.append(1)
        if len(calls) > 20:  # 4 steps of 5 iterations
            raise KeyboardInterrupt

    model.unet.register_forward_pre_hook(stop)
    with pytest.raises(Interrupted) as caught:
        model.invert(images, **options)
    torch.testing.assert_close(caught.value.images, whole[:1], rtol=1e-4, atol=1e-4)


def test_images_of_a_value_range():
    model = make_model(channels=1, value_range=(0, 1))
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    options = {"steps": 10, "iterations": 30}
    noise = model.invert(images.permute(0, 2, 3, 1).numpy(), **options)
    assert torch.equal(noise, model.invert(images.float() / 255, **options))
    again = model.sample(noise=noise, sampler="ddim", steps=10, clip=None)
    torch.testing.assert_close(again, images.float() / 255, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ({}, {"iterations": 0}, "iterations must be a whole number in 1"),
        ({}, {"eta": 0.5}, "unknown option of invert 'eta'; choose from: "),
        ({}, {"clip": 1.0}, "unknown option of invert 'clip'"),
        ({}, {"batch_size": 0}, "batch_size must be a whole number in 1"),
        ({}, {"batch_size": 1.5}, "batch_size must be a whole number in 1"),
        ({}, {"backend": "gpu"}, "unknown backend 'gpu'; choose from: "),
        ({}, {"guidance_rescale": 2}, "guidance_rescale must be a number in "),
        ({}, {"guidance_parallel": -1}, "guidance_parallel must be a number in "),
        ({}, {"labels": [3, 1]}, "labels are given, but this model is unconditional"),
        ({"prediction_type": "sample"}, {}, "a model that predicts the sample cannot be inverted"),
    ],
    ids=str,
)
def test_what_cannot_be_inverted(make, options, message, images):
    with pytest.raises(ValueError, match=message):
        make_model(**make).invert(images, **{"steps": 2} | options)


def test_slerp_keeps_length_and_angle():
    a, b = torch.randn(2, 3, 2, 8, 8, dtype=torch.float64)
    assert torch.equal(diffusion.slerp(a, b, 0.0), a)
    torch.testing.assert_close(diffusion.slerp(a, b, 1), b)
    shares = [0.25, 0.5, 0.875]
    between = diffusion.slerp(a, b, shares)
    assert between.shape == (3, *a.shape)
    unit_a, unit_b = (x / x.flatten(1).norm(dim=1)[:, None, None, None] for x in (a, b))
    theta = torch.arccos((unit_a * unit_b).flatten(1).sum(1))
    assert torch.equal(diffusion.slerp(a, b, np.array(shares)), between)
    for share, x in zip(shares, between, strict=True):
        torch.testing.assert_close(diffusion.slerp(a, b, share), x)
    for share, x in zip(shares, diffusion.slerp(unit_a, unit_b, torch.tensor(shares).double()), strict=True):
        flat = x.flatten(1)
        torch.testing.assert_close(flat.norm(dim=1), torch.ones(3, dtype=torch.float64))
        angle = torch.arccos((flat * unit_a.flatten(1)).sum(1))
        torch.testing.assert_close(angle, torch.as_tensor(share).double() * theta)
    torch.testing.assert_close(diffusion.slerp(a, a, 0.3), a)
    torch.testing.assert_close(diffusion.slerp(a.float(), 2 * a.float(), 0.5), 1.5 * a.float())
    assert not diffusion.slerp(torch.zeros(1, 4), torch.zeros(1, 4), 0.5).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), 0.5), "must have one shape"),
        ((torch.zeros(2, 3), [1], 0.5), "b must be a floating-point tensor"),
        ((torch.zeros(2, 30, dtype=torch.int64), torch.zeros(2, 30), 0.5), "a must be a floating-point"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), 1.5), r"share must be in 0..1, not 1.5"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.arange(90.0)), "share must be in 0..1, not a tensor"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), "half"), "share must be"),
    ],
)
def test_no_noise_or_share(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        diffusion.slerp(*arguments)
    assert "\n" not in str(error.value)
