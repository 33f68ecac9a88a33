"""Options that change where the steps lie and how the last one ends, against diffusers in float64."""

import math
from itertools import product

import diffusers
import pytest
import torch

from diffusion.process.bound import VARIANCES
from diffusion.process.prediction import PREDICTION_TYPES
from diffusion.process.schedule import NoiseSchedule
from diffusion.samplers import ddim, ddpm
from helpers.trajectories import Denoiser, difference, noises, run_table

SCHEDULE = NoiseSchedule.linear(200)
GRIDS = [("leading", 0), ("leading", 1), ("leading", 3), ("trailing", 0), ("linspace", 0)]
grids = pytest.mark.parametrize(("spacing", "offset"), GRIDS)


def run_scheduler(scheduler, model, noise, patch: pytest.MonkeyPatch, **options) -> list[torch.Tensor]:
    """x after every step of a scheduler with float64 tables; no noise is withheld from its last step."""
    scheduler.alphas_cumprod = SCHEDULE.alphas_cumprod
    if scheduler.config.get("set_alpha_to_one") is False:
        scheduler.final_alpha_cumprod = SCHEDULE.alphas_cumprod[0]
    x, trajectory = noise[0], []
    module = type(scheduler).__module__
    patch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: noise[len(trajectory) + 1])
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(model(x, t), t, x, **options).prev_sample
        trajectory.append(x)
    return trajectory


@pytest.mark.parametrize("variance", VARIANCES)
@grids
@pytest.mark.parametrize("steps", [1, 7, 40])
def test_ddpm(variance, spacing, offset, steps, monkeypatch):
    for prediction_type in PREDICTION_TYPES:
        options = {"prediction_type": prediction_type}
        scheduler = diffusers.DDPMScheduler(
            200, timestep_spacing=spacing, steps_offset=offset, variance_type=variance, **options
        )
        scheduler.set_timesteps(steps)
        table = ddpm(
            SCHEDULE,
            steps,
            spacing=spacing,
            steps_offset=offset,
            variance=variance,
            noise_in_last_step=True,
            **options,
        )
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()
        model = Denoiser(SCHEDULE, prediction_type, table.learned_variance, torch.float64)
        noise = [z.double() for z in noises(steps)]
        theirs = run_scheduler(scheduler, model, noise, monkeypatch)
        assert difference(run_table(table, model, noise), theirs) < 1e-9


@pytest.mark.thinned(2)
@grids
@pytest.mark.parametrize(("eta", "set_alpha_to_one"), list(product([0.0, 0.7], [True, False])))
@pytest.mark.parametrize("steps", [1, 7, 40, 101])
def test_ddim(spacing, offset, eta, set_alpha_to_one, steps, monkeypatch):
    for prediction_type, clipped_output in product(PREDICTION_TYPES, [True, False]):
        shared = {"prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one}
        scheduler = diffusers.DDIMScheduler(200, timestep_spacing=spacing, steps_offset=offset, **shared)
        scheduler.set_timesteps(steps)
        options = {"eta": eta, "use_clipped_model_output": clipped_output}
        table = ddim(
            SCHEDULE,
            steps,
            spacing=spacing,
            steps_offset=offset,
            fixed_stride=True,
            noise_in_last_step=True,
            **shared,
            **options,
        )
        model = Denoiser(SCHEDULE, prediction_type, dtype=torch.float64)
        noise = [z.double() for z in noises(steps)]
        theirs = run_scheduler(scheduler, model, noise, monkeypatch, **options)
        assert difference(run_table(table, model, noise), theirs) < 1e-9


def test_a_schedule_of_one_more_beta_is_visited_from_T_to_1():
    # Ho et al. 2020, algorithm 2, with a beta_0 that only scales alphas_cumprod and noise in every step:
    # x <- (x - beta_t / sqrt(1 - alphas_cumprod_t) eps) / sqrt(alpha_t) + sqrt(beta_t) z.
    T = 30
    schedule = NoiseSchedule.from_betas(torch.linspace(1e-3, 0.2, T + 1, dtype=torch.float64))
    table = ddpm(
        schedule,
        T,
        variance="fixed_large",
        steps_offset=1,
        set_alpha_to_one=False,
        noise_in_last_step=True,
        clip=None,
    )
    assert table.timesteps.tolist() == list(range(T, 0, -1))
    model = Denoiser(schedule, "epsilon", dtype=torch.float64)
    noise = [z.double() for z in noises(T)]
    x, expected = noise[0], []
    for t, z in zip(range(T, 0, -1), noise[1:], strict=True):
        beta, signal = schedule.betas[t].item(), schedule.alphas_cumprod[t].item()
        x = (x - beta / math.sqrt(1 - signal) * model(x, t)) / math.sqrt(1 - beta) + math.sqrt(beta) * z
        expected.append(x)
    assert difference(run_table(table, model, noise), expected) < 1e-9


def test_an_offset_beyond_the_last_timestep():
    with pytest.raises(ValueError, match="with 200 steps leads to timestep 200, beyond the last"):
        ddim(SCHEDULE, steps_offset=1)
    with pytest.raises(ValueError, match="steps_offset must be a whole number"):
        ddpm(SCHEDULE, 10, steps_offset=-1)
