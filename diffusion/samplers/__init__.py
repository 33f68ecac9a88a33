"""The samplers: each is a function that writes a reverse process down as a table, one row per step.

A row, `kernels.StepCoefficients`, holds the numbers of

    out    = uncond + guidance_scale * (cond - uncond)
    x0     = clamp(x0_from_x * x + x0_from_output * out, -clip_x0, clip_x0)
    x_next = coef_x * x + coef_x0 * x0 + coef_x0_prev * x0_prev + coef_output * out + sigma * z

with z ~ N(0, I), and everything here is float64. Each step leads to the timestep of the next row, and the
last to x_0, without noise, unless an option of the sampler says otherwise. All samplers take these arguments:

schedule: the model's NoiseSchedule.
steps: number of steps, 1..T; None is the full chain.
prediction_type: "epsilon", "sample" (x_0) or "v_prediction".
spacing: see `timesteps.spaced_timesteps`.
clip: x_0 is clipped to [-clip, clip]; None or inf leaves it.
guidance_scale, guidance_interval: see `guidance.guidance_scales`.
strength: share of the steps that are taken, in (0, 1], rounded down: the last ones. Less than 1 is for images
    that get the noise of the first step taken (SDEdit, Meng et al. 2022, arXiv 2108.01073).

They raise ValueError for values outside these, and for epsilon prediction where the first timestep visited
has zero SNR, since x_0 is undetermined there. A `SpacingWarning`, once per process, tells of a start too far
below T - 1.

A new sampler is a file here and an entry in `SAMPLERS`. Its keyword arguments beyond these are its options:
`DDPM.sample` takes them, and `diffusion sample` has a command-line option for each, with the text of its
`Annotated` type as help.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from ..utils.modules import importing
from ..utils.validation import choice, known_names
from .ancestral import ddpm as ddpm
from .ddim import ddim as ddim
from .dpm_solver import dpmpp_2m as dpmpp_2m
from .heun import heun as heun
from .table import StepTable
from .timesteps import SpacingWarning
from .unipc import unipc as unipc

SAMPLERS: dict[str, Callable[..., StepTable]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm++": dpmpp_2m,
    "heun": heun,
    "unipc": unipc,
}
SHARED_OPTIONS = ("prediction_type", "spacing", "clip", "guidance_scale", "guidance_interval", "strength")
EVALUATE_TWICE = ("heun",)  # in every step but the last
FULL_CHAIN = ("ddpm",)  # the command line takes all T steps of these by default, and few of the others

__all__ = ["SAMPLERS", "SpacingWarning", "StepTable"]
__all__ += [function.__name__ for function in SAMPLERS.values()]

__getattr__ = importing(__name__)


def options_of(sampler: str) -> dict[str, inspect.Parameter]:
    """The options of a sampler, by name: the keyword-only arguments of its function."""
    parameters = inspect.signature(SAMPLERS[sampler]).parameters
    return {name: p for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def own_options() -> dict[str, dict[str, Any]]:
    """The options beyond the shared ones of the package's docstring: {name: {sampler: its annotation}}."""
    found: dict[str, dict[str, Any]] = {}
    for sampler in SAMPLERS:
        for name, parameter in options_of(sampler).items():
            found.setdefault(name, {})[sampler] = parameter.annotation
    return {name: samplers for name, samplers in found.items() if name not in SHARED_OPTIONS}


def check_options(sampler: str, options: Iterable[str]) -> None:
    """ValueError unless there is a sampler of this name and it has these options."""
    choice("sampler", sampler, SAMPLERS)
    own = options_of(sampler)
    for name in options:
        others = [other for other in SAMPLERS if name in options_of(other)]
        if name not in own and others:
            raise ValueError(f"unknown option of {sampler} {name!r}; samplers with it: {', '.join(others)}")
    known_names(f"option of {sampler}", options, own)
