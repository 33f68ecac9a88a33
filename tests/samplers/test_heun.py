"""Heun's sampler: algorithms 1 and 2 of Karras et al. 2022, written out, and diffusers' scheduler."""

import itertools
import math

import diffusers
import pytest
import torch

import diffusion
from diffusion.kernels import reverse_step
from diffusion.process.noise_levels import NoiseLevels
from diffusion.process.schedule import NoiseSchedule
from diffusion.samplers import StepTable, heun

SHAPE = (2, 3, 4, 4)


def denoised(x, sigma):
    """A curved denoiser."""
    return torch.sin(x / math.sqrt(1 + sigma**2)) * (0.5 + 0.1 * sigma / (1 + sigma))


def run(table: StepTable, noise, predict) -> torch.Tensor:
    """The table's rows one after the other, in float64; predict(x, timestep) is the network's output."""
    x, x0 = noise(0) * table.initial_scale, None
    for i in range(len(table)):
        row, z = table.row(i), noise(i + 1)
        x, x0 = reverse_step(x, predict(x, row.timestep), row, x0_prev=x0, noise=z, backend="reference")
    return x


def noises(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64))


def rho_levels(steps, low, high, rho):
    """Equation 5 of the paper."""
    return [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(steps)
    ] + [0.0]


@pytest.mark.parametrize("steps", [2, 3, 18])
@pytest.mark.parametrize("options", [{}, {"sigma_min": 0.1, "sigma_max": 9.0, "rho": 3.0}], ids=str)
def test_it_is_algorithm_1(steps, options):
    levels = rho_levels(
        steps, options.get("sigma_min", 0.002), options.get("sigma_max", 80.0), options.get("rho", 7.0)
    )
    z = noises(1)
    x = z[0] * levels[0]
    for now, following in itertools.pairwise(levels):
        slope = (x - denoised(x, now)) / now
        moved = x + (following - now) * slope
        if following:
            slope = (slope + (moved - denoised(moved, following)) / following) / 2
        x = x + (following - now) * slope
    table = heun(NoiseLevels(), steps, prediction_type="sample", clip=None, **options)
    assert len(table) == 2 * steps - 1
    found = run(table, lambda k: z[0], denoised)
    torch.testing.assert_close(found, x, rtol=1e-9 if steps > 2 else 1e-7, atol=1e-9)


def test_it_is_algorithm_2_with_noise():
    steps, churn, low, high, scale = 10, 5.0, 0.05, 50.0, 1.003
    levels, z = rho_levels(steps, 0.002, 80.0, 7.0), noises(2 * steps)
    gamma = min(churn / steps, math.sqrt(2) - 1)
    x, added = z[0] * levels[0], 0
    for i in range(steps):
        raised = levels[i] * (1 + gamma * (low <= levels[i] <= high))
        if raised > levels[i]:  # the noise of step i comes with the correction of step i - 1
            x, added = x + math.sqrt(raised**2 - levels[i] ** 2) * scale * z[2 * i], added + 1
        slope = (x - denoised(x, raised)) / raised
        moved = x + (levels[i + 1] - raised) * slope
        if levels[i + 1]:
            slope = (slope + (moved - denoised(moved, levels[i + 1])) / levels[i + 1]) / 2
        x = x + (levels[i + 1] - raised) * slope
    assert added == 7
    options = {"s_churn": churn, "s_min": low, "s_max": high, "s_noise": scale}
    table = heun(NoiseLevels(), steps, prediction_type="sample", clip=None, **options)
    torch.testing.assert_close(run(table, z.__getitem__, denoised), x, rtol=1e-9, atol=1e-9)


def test_noise_before_the_first_step_is_part_of_the_initial_noise():
    options = {"prediction_type": "sample", "clip": None}
    table = heun(NoiseLevels(), 5, s_churn=1.0, s_noise=1.5, **options)
    raised = 80 * 1.2
    assert table.row(0).timestep == pytest.approx(raised, rel=1e-12)
    assert table.initial_scale == pytest.approx(math.hypot(80, 1.5 * math.sqrt(raised**2 - 80**2)), rel=1e-12)


def test_a_single_step_goes_from_sigma_max_to_the_image():
    table = heun(NoiseLevels(), 1, prediction_type="sample", clip=None)
    assert (len(table), table.initial_scale, table.row(0).timestep) == (1, 80.0, 80.0)
    x = torch.randn(SHAPE, dtype=torch.float64)
    assert torch.equal(run(table, lambda k: x, denoised), denoised(80 * x, 80.0))


def test_levels_stay_within_the_range_of_the_network():
    table = heun(NoiseLevels(0.02, 50.0), 4, prediction_type="sample")
    assert table.timesteps[0] == pytest.approx(50.0)
    assert table.timesteps[-1] == pytest.approx(0.02)
    levels = (9.0, 4.0, 2.0, 0.5, 0.0)
    table = heun(NoiseLevels(0.5, 9.0, levels), 4, prediction_type="sample", rho=1.0)
    assert table.timesteps[::2].tolist() == [9.0, 4.0, 4.0, 0.5]  # those nearest to 9, 6.17, 3.33 and 0.5


def test_guidance_and_its_interval_are_by_noise_level():
    table = heun(
        NoiseLevels(), 9, prediction_type="sample", guidance_scale=2.0, guidance_interval=(0.2, 20.0)
    )
    scales = [2.0 if 0.2 <= sigma <= 20 else 1.0 for sigma in table.timesteps.tolist()]
    assert table.column("guidance_scale") == scales
    assert {1.0, 2.0} == {*scales}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 4, 20])
def test_over_timesteps_it_is_the_scheduler_of_diffusers(steps, spacing, prediction_type):
    config = {"timestep_spacing": spacing, "prediction_type": prediction_type}
    scheduler = diffusers.HeunDiscreteScheduler(beta_start=1e-4, beta_end=0.02, **config)
    scheduler.set_timesteps(steps)
    options = {"prediction_type": prediction_type, "spacing": spacing, "clip": None}
    table, start = heun(NoiseSchedule.linear(), steps, **options), noises(1)[0]
    assert scheduler.timesteps.tolist() == table.timesteps.tolist()

    def predict(x, t):
        return torch.sin(x + t / 300)

    x = start * (scheduler.sigmas[0].double() ** 2 + 1).sqrt()
    for t in scheduler.timesteps:
        x = scheduler.step(predict(scheduler.scale_model_input(x, t), t.double()), t, x).prev_sample
    found = run(table, lambda k: start, predict)
    torch.testing.assert_close(found, x, rtol=2e-4, atol=2e-4)  # its noise levels are float32


def test_over_timesteps_it_takes_predicted_images_and_clips_them():
    schedule = NoiseSchedule.linear()
    table, x = heun(schedule, 5, prediction_type="sample", clip=0.5, spacing="trailing"), noises(1)[0]
    found = run(table, lambda k: x, lambda x, t: denoised(x, t / 1000))
    levels = [*(1 / schedule.alphas_cumprod[table.timesteps[::2]] - 1).sqrt().tolist(), 0.0]
    times = [*table.timesteps[::2].tolist(), 0]
    x = x * math.sqrt(1 + levels[0] ** 2)
    for i in range(5):
        now, following = levels[i], levels[i + 1]
        slopes = [(x - denoised(x / math.sqrt(1 + now**2), times[i] / 1000).clamp(-0.5, 0.5)) / now]
        moved = x + (following - now) * slopes[0]
        if following:
            image = denoised(moved / math.sqrt(1 + following**2), times[i + 1] / 1000).clamp(-0.5, 0.5)
            slopes.append((moved - image) / following)
        x = x + (following - now) * sum(slopes) / len(slopes)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)


def test_zero_snr():
    schedule = NoiseSchedule.cosine().rescale_zero_terminal_snr()
    table = heun(schedule, 10, prediction_type="v_prediction", spacing="trailing")
    assert table.table[:, 5:].isfinite().all()
    with pytest.raises(ValueError, match="SNR is zero"):
        heun(schedule, 10, spacing="trailing")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prediction_type": "epsilon"}, "prediction type must be 'sample'"),
        ({"spacing": "trailing"}, "choose rho"),
        ({"steps": 0}, "steps must be a whole number"),
        ({"sigma_min": 80.0}, "sigma_min must be less than sigma_max"),
        ({"sigma_max": 0.0}, "sigma_max must be"),
        ({"rho": 0.0}, "rho must be"),
        ({"s_churn": -1.0}, "s_churn must be"),
        ({"s_noise": math.nan}, "s_noise must be"),
    ],
)
def test_what_noise_levels_refuse(options, error):
    with pytest.raises(ValueError, match=error):
        heun(NoiseLevels(), **({"prediction_type": "sample"} | options))


@pytest.mark.parametrize("option", ["sigma_min", "sigma_max", "rho", "s_churn", "s_min", "s_max", "s_noise"])
def test_timesteps_refuse_the_options_of_noise_levels(option):
    with pytest.raises(ValueError, match=f"{option} is of continuous noise levels"):
        heun(NoiseSchedule.linear(), 5, **{option: 0.5})


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_the_other_samplers_refuse_noise_levels(sampler):
    with pytest.raises(ValueError, match="continuous noise levels"):
        diffusion.steps.SAMPLERS[sampler](NoiseLevels(), 5, prediction_type="sample")
