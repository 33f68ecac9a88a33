"""The variational bound against improved-diffusion's numbers, scipy and torch.distributions."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from diffusion import NoiseSchedule
from diffusion.evaluation.likelihood import bits_per_dimension
from diffusion.kernels import philox_normal
from diffusion.process.bound import prior_term, variational_bound_terms
from diffusion.process.forward import q_sample
from helpers.models import make_model
from helpers.paths import FIXTURES

RECORDED = json.loads((FIXTURES / "improved_diffusion_bound.json").read_text())
SCHEDULE = NoiseSchedule.linear()


def wave(k: float) -> torch.Tensor:
    return torch.sin(torch.arange(4 * 3 * 4 * 4, dtype=torch.float64).reshape(4, 3, 4, 4) * k + k)


def images() -> torch.Tensor:
    """8-bit images in [-1, 1], a black and a white one among them."""
    x0 = ((wave(1.7) * 0.5 + 0.5) * 255).round() / 127.5 - 1
    x0[0], x0[1] = -1, 1
    return x0


@pytest.mark.parametrize(
    "case", RECORDED["cases"], ids=lambda c: f"{c['prediction_type']}-{c['variance']}-{c['t']}"
)
def test_terms_are_improved_diffusions(case):
    """improved-diffusion's numbers are float32; its approximate normal distribution shows at t = 0."""
    x0, noise, t = images(), wave(2.3) * 1.4, torch.full((4,), case["t"])
    output = (noise if case["prediction_type"] == "epsilon" else x0) + 0.02 * wave(0.9)
    if case["variance"] == "learned_range":
        output = torch.cat([output, wave(3.1)], dim=1)
    found = variational_bound_terms(
        SCHEDULE,
        case["prediction_type"],
        case["variance"],
        x0,
        q_sample(SCHEDULE, x0, t, noise),
        t,
        output,
    )
    expected = torch.tensor(case["terms"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=2e-2 if case["t"] == 0 else 1e-3, atol=2e-6)


def test_the_prior_is_improved_diffusions():
    expected = torch.tensor(RECORDED["prior"], dtype=torch.float64)
    torch.testing.assert_close(prior_term(SCHEDULE, images()), expected, rtol=0.02, atol=1e-7)
    bar = SCHEDULE.alphas_cumprod[-1]
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(bar.sqrt() * images(), (1 - bar).sqrt()),
        torch.distributions.Normal(0.0, 1.0),
    )
    expected = divergence.flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(prior_term(SCHEDULE, images()), expected, rtol=1e-6, atol=1e-12)


def test_the_first_term_is_the_mass_of_each_value():
    """The peer is scipy's normal distribution, for a mean off by up to 0.05 and the variance beta_1."""
    x0, t = images(), torch.zeros(4, dtype=torch.int64)
    output = x0 + 0.05 * wave(0.9)
    x_t = q_sample(SCHEDULE, x0, t, wave(2.3))
    found = variational_bound_terms(SCHEDULE, "sample", "fixed_large", x0, x_t, t, output, clip=None)
    betas, bar = SCHEDULE.betas.numpy(), SCHEDULE.alphas_cumprod.numpy()
    deviation = math.sqrt(betas[1] * (1 - bar[0]) / (1 - bar[1]))
    x, mean = x0.numpy(), output.numpy()  # at t = 0 the posterior's mean is x_0
    above, below = (x - mean + 1 / 255) / deviation, (x - mean - 1 / 255) / deviation
    mass = np.where(below > 0, norm.sf(below) - norm.sf(above), norm.cdf(above) - norm.cdf(below))
    mass = np.where(x < -0.999, norm.cdf(above), np.where(x > 0.999, norm.sf(below), mass))
    expected = -np.log2(np.maximum(mass, 1e-12)).reshape(4, -1).mean(1)
    assert expected.min() > 1
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("learned", [False, True])
def test_bits_per_dimension_is_the_sum_over_all_timesteps(learned):
    model = make_model(T=7, learned_variance=learned)
    pixels = torch.randint(
        0, 256, (3, 2, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = bits_per_dimension(model, pixels, seed=3, batch_size=2)
    x0 = pixels.float() / 127.5 - 1
    total, ids = prior_term(model.schedule, x0).double(), torch.arange(3)
    for step in range(7):
        t = torch.full((3,), step)
        x_t = q_sample(
            model.schedule, x0, t, philox_normal(x0.shape, seed=3, sample_ids=ids, stream=step, device="cpu")
        )
        with torch.no_grad():
            output = model.unet(x_t, t)
        terms = variational_bound_terms(
            model.schedule, "epsilon", model.variance, x0, x_t, t, output, model.clip
        )
        assert found["terms"][step] == pytest.approx(terms.mean().item(), rel=1e-3)
        total += terms
    assert found["bits_per_dim"] == pytest.approx(total.mean().item(), rel=1e-3)
    assert found["standard_error"] == pytest.approx(total.std().item() / 3**0.5, rel=1e-2)
    assert found["images"] == 3


def test_what_does_not_fit():
    x, t = images(), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="does not go with"):
        variational_bound_terms(SCHEDULE, "epsilon", "learned_range", x, x, t, x)
    with pytest.raises(ValueError, match="unknown variance"):
        variational_bound_terms(SCHEDULE, "epsilon", "other", x, x, t, x)
    with pytest.raises(ValueError, match=r"uint8 \['N', 2, 8, 8\]"):
        bits_per_dimension(make_model(), torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
