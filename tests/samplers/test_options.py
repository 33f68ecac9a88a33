"""A sampler's options are those of its function: nothing else lists them."""

import argparse
import importlib
from typing import Annotated

import pytest
import torch

import diffusion
from diffusion.cli import sample
from diffusion.process.schedule import NoiseSchedule
from diffusion.samplers import SAMPLERS, StepTable, ddim, options_of, own_options
from helpers.models import make_model


def noisy_ddim(
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction_type: str = "epsilon",
    spacing: str = "leading",
    clip: float | None = 1.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    churn: Annotated[float, "noise, 0 to 1"] = 0.25,
    rounds: Annotated[bool, "round"] = False,
) -> StepTable:
    shared = {"prediction_type": prediction_type, "spacing": spacing, "clip": clip}
    return ddim(
        schedule, steps, eta=round(churn) if rounds else churn, guidance_scale=guidance_scale, **shared
    )


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "noisy", noisy_ddim)


def test_the_model_takes_the_options_of_a_new_sampler(registered):
    model, options = make_model(), {"num_samples": 2, "steps": 3}
    found = model.sample(sampler="noisy", churn=0.75, **options)
    assert torch.equal(found, model.sample(sampler="ddim", eta=0.75, **options))
    with pytest.raises(ValueError, match="unknown option of ddim 'churn'"):
        model.sample(sampler="ddim", churn=0.75, **options)


def test_the_command_line_has_the_options_of_a_new_sampler(registered, capsys):
    parser = argparse.ArgumentParser()
    sample.add_arguments(parser)
    args = parser.parse_args(["--sampler", "noisy", "--churn", "0.75", "--no-rounds"])
    assert (args.churn, args.rounds, args.eta) == (0.75, False, None)
    assert "noisy: noise, 0 to 1" in parser.format_help()


def test_which_options_a_sampler_has():
    ends = {"steps_offset", "set_alpha_to_one", "noise_in_last_step", "epsilon_at_zero_snr"}
    ddim_only = {"eta", "use_clipped_model_output", "fixed_stride"}
    solver_only = {"sde", "algorithm", "solver_order", "solver_type", "sigmas", "final_sigmas_type"}
    solver_only |= {"lower_order_final", "euler_at_final", "lambda_min_clipped"}
    edm = {"sigma_min", "sigma_max", "rho", "s_churn", "s_min", "s_max", "s_noise"}
    assert {*own_options()} == {"variance", "predict_x0"} | ddim_only | solver_only | ends | edm
    shared = {"prediction_type", "spacing", "clip", "guidance_scale", "guidance_interval", "strength"}
    assert {*options_of("ddim")} == shared | ddim_only | ends
    assert {*options_of("ddpm")} == shared | {"variance"} | ends


def test_the_public_name_of_the_samplers_is_a_module():
    public = importlib.import_module("diffusion.steps")
    assert public.SAMPLERS is SAMPLERS
    assert public.ddim is diffusion.steps.ddim is ddim


def test_an_offset_can_be_a_models_default():
    model = make_model()
    own = diffusion.DDPM(model.unet, model.schedule, sampler_options={"ddim": {"steps_offset": 1}})
    assert own.steps("ddim", 5).timesteps[-1] == 1


def test_a_models_options_are_checked_by_their_type():
    """Equal values of other types, after the right ones were found to serve."""
    unet = make_model().unet
    for right, wrong in (({"solver_order": 1}, {"solver_order": True}), ({"sde": True}, {"sde": 1})):
        diffusion.DDPM(unet, NoiseSchedule.linear(), sampler_options={"dpm++": right})
        with pytest.raises((TypeError, ValueError), match=r"sampler_options\['dpm\+\+'\]"):
            diffusion.DDPM(unet, NoiseSchedule.linear(), sampler_options={"dpm++": wrong})
