"""Classifier-free guidance and dynamic thresholding against diffusers."""

import math

import diffusers
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from diffusion.kernels import StepCoefficients, reverse_step
from diffusion.process.objective import drop_labels
from diffusion.samplers.guidance import guidance_scales, project_guidance, rescale_guidance
from diffusion.samplers.thresholding import dynamic_threshold, thresholded_step

TIMESTEPS = torch.tensor([800, 600, 400, 200, 0])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (None, [3, 3, 3, 3, 3]),
        ((200, 600), [1, 3, 3, 3, 1]),
        ((201, 599.5), [1, 1, 3, 1, 1]),
        ((0, 999), [3, 3, 3, 3, 3]),
        ((300, 300), [1, 1, 1, 1, 1]),
        ([400, math.inf], [3, 3, 3, 1, 1]),
    ],
)
def test_guidance_is_1_outside_the_interval(interval, expected):
    scales = guidance_scales(TIMESTEPS, 3.0, interval)
    assert scales.dtype == torch.float64
    assert scales.tolist() == expected


@pytest.mark.parametrize("scale", [0, 1, -0.5, 7.5])
def test_any_finite_scale(scale):
    assert guidance_scales(TIMESTEPS, scale).tolist() == [scale] * 5


@pytest.mark.parametrize(
    ("scale", "interval", "message"),
    [
        (math.nan, None, "finite"),
        (math.inf, None, "finite"),
        (3.0, (600, 200), "low <= high"),
        (3.0, (600,), "low <= high"),
        (3.0, (0, math.nan), "low <= high"),
    ],
)
def test_wrong_guidance(scale, interval, message):
    with pytest.raises(ValueError, match=message):
        guidance_scales(TIMESTEPS, scale, interval)


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7, 1.0])
def test_rescaling_is_that_of_diffusers(phi):
    cond = randn(4, 3, 8, 8) * 1.7 + 0.3
    guided = randn(4, 3, 8, 8, seed=1) * torch.tensor([0.5, 1, 3, 30]).reshape(4, 1, 1, 1)
    torch.testing.assert_close(
        rescale_guidance(guided, cond, phi), rescale_noise_cfg(guided, cond, phi), rtol=1e-5, atol=1e-5
    )


def test_full_rescaling_gives_every_image_the_conditional_deviation():
    cond, guided = randn(4, 1, 6, 6), 5 * randn(4, 1, 6, 6, seed=1)
    rescaled = rescale_guidance(guided, cond, 1.0)
    torch.testing.assert_close(rescaled.std((1, 2, 3)), cond.std((1, 2, 3)))


def test_rescaling_a_constant_image_leaves_it():
    guided = torch.full((1, 1, 1, 1), 3.0)
    assert torch.equal(rescale_guidance(guided, torch.ones_like(guided), 0.7), guided)
    guided = torch.full((2, 1, 4, 4), 0.25)
    assert torch.equal(rescale_guidance(guided, randn(2, 1, 4, 4), 0.5), guided)


def test_wrong_rescaling():
    x = randn(2, 1, 4, 4)
    for phi in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            rescale_guidance(x, x, phi)
    with pytest.raises(ValueError, match="one shape"):
        rescale_guidance(x, x[:1], 0.5)


def test_labels_are_dropped_with_their_probability():
    labels = torch.arange(100_000) % 10
    dropped = drop_labels(labels, 0.1, 10, torch.Generator().manual_seed(0))
    null = dropped == 10
    assert torch.equal(dropped[~null], labels[~null])
    assert null.sum().item() == pytest.approx(10_000, abs=5 * math.sqrt(100_000 * 0.1 * 0.9))
    # independent of the label
    counts = torch.bincount(labels[null], minlength=10).double()
    assert (counts - 1000).abs().max() < 5 * math.sqrt(10_000 * 0.1 * 0.9)
    assert labels.max() == 9  # the input is untouched
    assert dropped.dtype == torch.int64


def test_dropping_labels_follows_its_generator():
    labels = torch.arange(50)
    first, second = (drop_labels(labels, 0.5, 99, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(drop_labels(labels, 0.5, 99), first)


def test_dropping_no_or_all_labels():
    labels = torch.arange(50)
    assert torch.equal(drop_labels(labels, 0.0, 99), labels)
    assert (drop_labels(labels, 1.0, 99) == 99).all()


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_wrong_probability(p):
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        drop_labels(torch.arange(3), p, 10)


def test_drop_labels_needs_a_null_label():
    with pytest.raises(ValueError, match="no null label"):
        drop_labels(torch.arange(3), 0.5, None)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("max_value", [1.0, 1.5, 100.0])
@pytest.mark.parametrize("shape", [(3, 3, 7, 5), (3, 1, 1, 1), (2, 1, 32, 32)])
def test_thresholding_is_that_of_diffusers(ratio, max_value, shape):
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=max_value
    )
    scale = torch.tensor([0.1, 1.0, 4.0])[: shape[0]].reshape(-1, 1, 1, 1)
    x0 = randn(*shape) * scale
    theirs = scheduler._threshold_sample(x0)
    torch.testing.assert_close(dynamic_threshold(x0, ratio, max_value), theirs, rtol=1e-5, atol=1e-5)


def test_thresholding_does_not_depend_on_the_batch():
    x0 = 3 * randn(4, 3, 8, 8)
    together = dynamic_threshold(x0, 0.9, 10.0)
    alone = torch.cat([dynamic_threshold(image, 0.9, 10.0) for image in x0.split(1)])
    assert torch.equal(together, alone)


def test_thresholding_takes_more_elements_than_torch_quantile_in_older_versions():
    x0 = torch.linspace(-2, 2, 2**24 + 2).reshape(1, 1, 2, -1)
    # |x0| is uniform on [0, 2], so the quantile is 1.99
    assert dynamic_threshold(x0, max_value=5.0)[0, 0, 1, 2**22].item() == pytest.approx(
        x0[0, 0, 1, 2**22].item() / 1.99, rel=1e-6
    )


def test_wrong_thresholds():
    x0 = randn(2, 1, 4, 4)
    for ratio in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="ratio"):
            dynamic_threshold(x0, ratio)
    for max_value in (0.5, math.nan):
        with pytest.raises(ValueError, match="max_value"):
            dynamic_threshold(x0, 0.9, max_value)


ROW = StepCoefficients(
    timestep=5,
    guidance_scale=2,
    x0_from_x=1.5,
    x0_from_output=-2.5,
    clip_x0=math.inf,
    coef_x=0.5,
    coef_x0=0.7,
    coef_x0_prev=-0.2,
    coef_output=0.3,
    sigma=0.1,
)


def test_a_thresholded_step_is_the_step_with_another_x0():
    x, cond, uncond, x0_prev, z = (randn(2, 3, 4, 4, seed=seed) for seed in range(5))
    out = uncond + 2 * (cond - uncond)
    row, carried, x0 = thresholded_step(ROW, x, out, x0_prev, ratio=0.8, max_value=2.0)
    x_next, _ = reverse_step(x, cond, row, model_output_uncond=uncond, x0_prev=carried, noise=z)
    expected_x0 = dynamic_threshold(1.5 * x - 2.5 * out, 0.8, 2.0)
    expected = 0.5 * x + 0.7 * expected_x0 - 0.2 * x0_prev + 0.3 * out + 0.1 * z
    torch.testing.assert_close(x0, expected_x0)
    torch.testing.assert_close(x_next, expected)


def test_a_multistep_needs_the_x0_before():
    x = randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match="x0_prev"):
        thresholded_step(ROW, x, x)
    thresholded_step(ROW._replace(coef_x0_prev=0.0), x, x)


def test_projected_guidance_is_orthogonal_to_the_conditional_prediction():
    cond, uncond = randn(3, 2, 4, 4), randn(3, 2, 4, 4) + 0.5
    update = cond - uncond
    kept = project_guidance(update, cond, 0.0)
    for i in range(3):  # Gram-Schmidt, image by image
        a, b = update[i].double().flatten(), cond[i].double().flatten()
        expected = a - (a @ b) / (b @ b) * b
        torch.testing.assert_close(kept[i].double().flatten(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(project_guidance(update, cond, 1.0), update)
    half = project_guidance(update, cond, 0.5)
    torch.testing.assert_close(half, (kept + update) / 2, rtol=0, atol=1e-6)
    assert torch.equal(project_guidance(update, torch.zeros_like(cond), 0.0), update)
