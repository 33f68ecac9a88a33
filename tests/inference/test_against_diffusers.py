"""DDPM.sample against the schedulers of diffusers."""

import copy
import importlib

import diffusers
import pytest
import torch

from diffusion.kernels._tolerance import wrong
from helpers.models import make_model
from helpers.noise import fixed_noise
from helpers.samplers import CLIPPED_OUTPUT, TESTED, VARIANTS, peer_of


def diffusers_chain(model, scheduler, noise, steps, **step_options):
    """diffusers' own loop: the scheduler's timesteps and updates, with its noise replaced by ours."""
    scheduler.set_timesteps(steps)
    module = importlib.import_module(type(scheduler).__module__)
    x, drawn = noise(0), []
    with pytest.MonkeyPatch.context() as patch:
        for k, t in enumerate(scheduler.timesteps, 1):
            patch.setattr(module, "randn_tensor", lambda *args, k=k, **kwargs: drawn.append(k) or noise(k))
            with torch.no_grad():
                output = model.unet(x, t.expand(len(x)), None)
            x = scheduler.step(output, t, x, **step_options).prev_sample
    stochastic = isinstance(scheduler, diffusers.DDPMScheduler) or step_options.get("eta")
    stochastic = stochastic or "sde" in scheduler.config.get("algorithm_type", "")
    assert drawn[: steps - 1] == ([*range(1, steps)] if stochastic else [])  # the last step may draw none
    return x


@pytest.mark.thinned
@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("sampler", "options"),
    [v for v in (*VARIANTS, CLIPPED_OUTPUT) if v[1].get("variance") != "learned_range"],  # the next but one
    ids=str,
)
def test_sample_equals_diffusers(sampler, options, prediction_type, steps):
    model, noise = make_model(prediction_type=prediction_type), fixed_noise(3)
    scheduler, step_options = peer_of(
        sampler,
        options,
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type=prediction_type,
        timestep_spacing="leading",
    )
    peer = diffusers_chain(model, scheduler, noise, steps, **step_options)
    double = copy.deepcopy(model)
    double.unet.double()
    expected = diffusers_chain(double, scheduler, lambda k: noise(k).double(), steps, **step_options)
    clip = {} if TESTED[sampler].clips else {"clip": None}
    x = model.sample(num_samples=3, sampler=sampler, steps=steps, noise=noise, **clip, **options)
    assert expected.abs().max() > 0.1
    assert wrong(x, peer, expected, accuracy=1e-4) is None  # some chains make much of the peer's own rounding


@pytest.mark.parametrize("T", [100, pytest.param(1000, marks=pytest.mark.exhaustive)])
def test_full_chain_equals_diffusers(T):
    model, noise = make_model(T=T), fixed_noise(2)
    scheduler = diffusers.DDPMScheduler(T, beta_start=1e-4, beta_end=20 / T)
    expected = diffusers_chain(model, scheduler, noise, T)
    torch.testing.assert_close(model.sample(num_samples=2, noise=noise), expected, atol=1e-4, rtol=1e-4)


def test_learned_variance_equals_diffusers():
    model, noise = make_model(learned_variance=True), fixed_noise(2)
    assert model.variance == "learned_range"
    scheduler = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, variance_type="learned_range")
    expected = diffusers_chain(model, scheduler, noise, 50)
    torch.testing.assert_close(
        model.sample(num_samples=2, steps=50, noise=noise), expected, atol=1e-4, rtol=1e-4
    )


def test_a_learned_variance_is_left_aside_where_the_sampler_has_its_own():
    model, noise = make_model(learned_variance=True), fixed_noise(2)
    first_half = make_model()
    state = model.unet.state_dict()
    first_half.unet.load_state_dict(
        state | {f"output_conv.{name}": state[f"output_conv.{name}"][:2] for name in ("weight", "bias")}
    )
    for options in ({"sampler": "ddim", "eta": 1.0}, {"sampler": "ddpm", "variance": "fixed_large"}):
        expected = first_half.sample(num_samples=2, steps=10, noise=noise, **options)
        torch.testing.assert_close(model.sample(num_samples=2, steps=10, noise=noise, **options), expected)
