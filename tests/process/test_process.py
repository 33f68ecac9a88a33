"""The forward process and the training targets against diffusers and the papers' formulas."""

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from diffusion.process.forward import q_sample
from diffusion.process.objective import loss_weight, target
from diffusion.process.prediction import PREDICTION_TYPES, predict_epsilon, predict_x0
from diffusion.process.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.linear()
ZERO_SNR = SCHEDULE.rescale_zero_terminal_snr()
prediction_types = pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)


def images(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x0, t, noise; t holds both ends."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(5, 3, 4, 2, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(5, 3, 4, 2, generator=generator, dtype=torch.float64)
    return x0.to(dtype), torch.tensor([0, 999, 500, 1, 250]), noise.to(dtype)


@pytest.mark.parametrize(("schedule", "zero_snr"), [(SCHEDULE, False), (ZERO_SNR, True)])
def test_noisy_images_and_velocity_are_those_of_diffusers(schedule, zero_snr):
    scheduler = diffusers.DDPMScheduler(rescale_betas_zero_snr=zero_snr)
    x0, t, noise = images()
    torch.testing.assert_close(
        q_sample(schedule, x0, t, noise), scheduler.add_noise(x0, noise, t), rtol=0, atol=2e-5
    )
    torch.testing.assert_close(
        target(schedule, "v_prediction", x0, t, noise),
        scheduler.get_velocity(x0, noise, t),
        rtol=0,
        atol=2e-5,
    )


def test_noisy_images_keep_their_variance():
    # E[x_t^2] = alphas_cumprod E[x_0^2] + 1 - alphas_cumprod = 1 for x_0 of unit variance
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 100_000, generator=generator, dtype=torch.float64)
    for t in (0, 300, 999):
        x = q_sample(SCHEDULE, x0, torch.tensor([t]), noise)
        assert x.square().mean().item() == pytest.approx(1, abs=0.02)


@prediction_types
@pytest.mark.parametrize("schedule", [SCHEDULE, NoiseSchedule.cosine(), ZERO_SNR])
def test_a_perfect_model_gives_x0_and_noise_back(schedule, prediction_type):
    x0, t, noise = images(torch.float64)
    x = q_sample(schedule, x0, t, noise)
    output = target(schedule, prediction_type, x0, t, noise)
    if prediction_type == "epsilon" and schedule is ZERO_SNR:
        with pytest.raises(ValueError, match="SNR is zero"):
            predict_x0(schedule, prediction_type, x, t, output)
    else:
        torch.testing.assert_close(predict_x0(schedule, prediction_type, x, t, output), x0)
    torch.testing.assert_close(predict_epsilon(schedule, prediction_type, x, t, output), noise)


def test_the_targets():
    x0, t, noise = images()
    assert torch.equal(target(SCHEDULE, "epsilon", x0, t, noise), noise)
    assert torch.equal(target(SCHEDULE, "sample", x0, t, noise), x0)


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_coefficients_are_cast_late(dtype, result):
    x0, t, noise = images(dtype)
    x = q_sample(SCHEDULE, x0, t, noise)
    assert x.dtype == result
    exact = q_sample(SCHEDULE, x0.double(), t, noise.double())
    torch.testing.assert_close(x.double(), exact, rtol=0, atol=1e-6)


def min_snr_weight(prediction_type, snr, gamma):
    """The weights that diffusers' training scripts compute."""
    base = torch.stack([snr, torch.full_like(snr, gamma)], dim=1).min(dim=1)[0]
    return {"epsilon": base / snr, "sample": base, "v_prediction": base / (snr + 1)}[prediction_type]


@prediction_types
@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr_weights_are_those_of_diffusers(prediction_type, gamma):
    t = torch.arange(1000)
    snr = compute_snr(diffusers.DDPMScheduler(), t)
    weights = loss_weight(SCHEDULE, prediction_type, t, "min_snr", gamma)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, min_snr_weight(prediction_type, snr, gamma), rtol=1e-3, atol=0)


def test_min_snr_weights_are_one_weight_of_the_error_in_x0():
    # Hang et al. 2023: whatever is predicted, min(SNR, gamma) ||x_0 - predicted x_0||^2
    x0, t, noise = images(torch.float64)
    x = q_sample(SCHEDULE, x0, t, noise)
    error = 0.1 * noise.flip(0)
    losses = []
    for prediction_type in PREDICTION_TYPES:
        output = target(SCHEDULE, prediction_type, x0, t, noise) + error
        x0_error = (predict_x0(SCHEDULE, prediction_type, x, t, output) - x0).square().mean((1, 2, 3))
        weights = loss_weight(SCHEDULE, prediction_type, t, "min_snr").double()
        losses.append(weights * error.square().mean((1, 2, 3)) / x0_error)
    snr = SCHEDULE.alphas_cumprod[t] / (1 - SCHEDULE.alphas_cumprod[t])
    for loss in losses:
        torch.testing.assert_close(loss, snr.clamp(max=5), rtol=1e-5, atol=0)


@prediction_types
def test_weights_at_zero_snr_are_finite(prediction_type):
    weight = loss_weight(ZERO_SNR, prediction_type, torch.tensor([999]), "min_snr")
    assert weight.tolist() == [1.0 if prediction_type == "epsilon" else 0.0]


@prediction_types
def test_uniform_weights(prediction_type):
    assert loss_weight(SCHEDULE, prediction_type, torch.tensor([0, 5])).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": torch.tensor([0, 1, 2, 3, 1000])}, r"in 0\.\.999"),
        ({"t": torch.tensor([0, 1, 2, 3, -1])}, r"in 0\.\.999"),
        ({"t": torch.tensor([0, 1])}, "one timestep per image"),
        ({"t": torch.tensor(3)}, "one timestep per image"),
        ({"t": torch.zeros(5)}, "int64"),
        ({"noise": torch.zeros(5, 1, 4, 2)}, "shape"),
    ],
)
def test_wrong_arguments(change, message):
    x0, t, noise = images()
    arguments = {"x0": x0, "t": t, "noise": noise, **change}
    with pytest.raises(ValueError, match=message):
        q_sample(SCHEDULE, **arguments)
    with pytest.raises(ValueError, match=message):
        target(SCHEDULE, "v_prediction", **arguments)


def test_wrong_names():
    x0, t, noise = images()
    for function in (target, predict_x0, predict_epsilon):
        with pytest.raises(ValueError, match="epsilon, sample, v_prediction"):
            function(SCHEDULE, "velocity", x0, t, noise)
    with pytest.raises(ValueError, match="epsilon, sample, v_prediction"):
        loss_weight(SCHEDULE, "velocity", t)
    with pytest.raises(ValueError, match="uniform, min_snr"):
        loss_weight(SCHEDULE, "epsilon", t, "snr")
    with pytest.raises(ValueError, match=r"gamma must be a number in \(0, "):
        loss_weight(SCHEDULE, "epsilon", t, "min_snr", gamma=0.0)
    with pytest.raises(ValueError, match="shape"):
        predict_x0(SCHEDULE, "sample", x0, t, noise[:2])
