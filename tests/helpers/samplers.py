"""The samplers with each of their options, and the schedulers of diffusers that they equal.

A new sampler is tested by its entry here: its tables (test_steps), its trajectories (test_sampler_parity,
test_against_diffusers), the timesteps that its steps lead to (test_where_steps_lead), and its independence of
the default device.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import pytest

from diffusion.process.bound import VARIANCES
from helpers.deviations import ddim_deviation, solver_deviation


class Tested(NamedTuple):
    """The options and the peer with which one sampler is tested."""

    options: list[dict[str, Any]]  # each is run through all tests
    scheduler: type  # diffusers' class
    config: Callable[..., dict[str, Any]]  # the scheduler's arguments that say the same as options
    # Of samples, by the paper's formula, from the timesteps visited and the options; see helpers.deviations.
    deviation: Callable[[list[int], dict[str, Any]], float]
    step: tuple[str, ...] = ()  # the options that diffusers takes in `scheduler.step` instead
    clips: bool = True  # whether the scheduler clips x_0
    float64: bool = True  # whether it computes in float64 where its input is float64


TESTED = {
    "ddpm": Tested(
        [{"variance": variance} for variance in VARIANCES],
        diffusers.DDPMScheduler,
        lambda variance: {"variance_type": variance},
        ddim_deviation,
    ),
    "ddim": Tested(
        [{"eta": eta} for eta in (0.0, 0.5, 1.0)],
        diffusers.DDIMScheduler,
        lambda **options: {},
        ddim_deviation,
        step=("eta", "use_clipped_model_output"),
    ),
    "dpm++": Tested(
        [{"sde": sde} for sde in (False, True)],
        diffusers.DPMSolverMultistepScheduler,
        lambda sde: {"algorithm_type": "sde-dpmsolver++" if sde else "dpmsolver++"},
        solver_deviation,
        clips=False,
        float64=False,
    ),
}
VARIANTS = [(sampler, options) for sampler, tested in TESTED.items() for options in tested.options]
CLIPPED_OUTPUT = ("ddim", {"eta": 0.5, "use_clipped_model_output": True})
variants = pytest.mark.parametrize(("sampler", "options"), VARIANTS, ids=str)


def peer_of(sampler: str, options: dict[str, Any], **config) -> tuple[Any, dict[str, Any]]:
    """The scheduler of diffusers for a sampler, and what its `step` takes besides."""
    tested = TESTED[sampler]
    step = {name: value for name, value in options.items() if name in tested.step}
    return tested.scheduler(**tested.config(**options), **config), step
