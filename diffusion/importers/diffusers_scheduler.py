"""Reads the schedulers of diffusers: the noise schedule, and the sampler that gives their images."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..process.prediction import PREDICTION_TYPES
from ..process.schedule import NoiseSchedule
from ..samplers import SAMPLERS, options_of
from ..utils.validation import number
from .diffusers_unet import known

SPACINGS = ("leading", "linspace", "trailing")
BETA_SCHEDULES = ("linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2")
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
    None: "fixed_small",
}
FEW_STEPS = 50  # the steps of most pipelines by default
PIPELINE_STEPS = {"DDPMPipeline": 1000}  # and of those that take others
# Pipelines that turn every scheduler into one of this class.
PIPELINE_SCHEDULERS = {"DDIMPipeline": "DDIMScheduler", "PNDMPipeline": "PNDMScheduler"}
SIGMAS = {  # the first that is true counts
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "lu",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}


class Scheduler(NamedTuple):
    """The contents of a scheduler's configuration.

    conventions: further arguments of `DDPM`: "prediction_type", "variance", "clip" and "sampler". note: a
    line that names the scheduler where the sampler is only the nearest to it; "" otherwise.
    """

    schedule: NoiseSchedule
    conventions: dict[str, Any]
    note: str = ""


def read_scheduler(config: dict[str, Any], pipeline: str | None = None) -> Scheduler:
    """The noise schedule of a scheduler's configuration, and its sampler with the pipeline's number of steps.

    pipeline: the class of the pipeline, which decides the steps and may replace the scheduler; None if it is
    unknown. ValueError naming a class or an option that cannot be represented.
    """
    name = config.get("_class_name")
    if pipeline in PIPELINE_SCHEDULERS:
        name = PIPELINE_SCHEDULERS[pipeline]
    if isinstance(name, str) and name.startswith(OTHER_PROCESSES):
        raise ValueError(f"_class_name {name!r} cannot be imported: its process is not that of DDPM")
    name = str(known("_class_name", name, [*EXACT, *NEAREST]))
    if config.get("use_flow_sigmas"):
        raise ValueError("use_flow_sigmas cannot be imported: flow matching is another process")
    prediction = config.get("prediction_type", "epsilon" if config.get("predict_epsilon", True) else "sample")
    known("prediction_type", prediction, PREDICTION_TYPES)
    clips = config.get("clip_sample", CLIPS[name]) if name in CLIPS else False
    clip = number("clip_sample_range", config.get("clip_sample_range", 1.0), above=0) if clips else None
    conventions = {
        "prediction_type": prediction,
        "variance": _variance(name, config.get("variance_type")),
        "clip": clip,
    }
    schedule = _schedule(config)
    read = EXACT.get(name) or NEAREST[name]
    sampler = {"name": "", "steps": None} | read(config)
    if name in EXACT and config.get("thresholding") and sampler.get("predict_x0", True):
        sampler["dynamic_threshold"] = config.get("dynamic_thresholding_ratio", 0.995)
        sampler["dynamic_threshold_max"] = config.get("sample_max_value", 1.0)
    zero_snr = config.get("rescale_betas_zero_snr") and "epsilon_at_zero_snr" in options_of(sampler["name"])
    if zero_snr and prediction == "epsilon":
        sampler["epsilon_at_zero_snr"] = True
    sampler["steps"] = _steps(schedule.T, sampler, pipeline)
    note, unlike = "", name if name in NEAREST else _unlike(name, config)
    if unlike:
        note = (
            f"{unlike} is no sampler of this package; {_words(sampler)} is the nearest, and its images differ"
        )
    return Scheduler(schedule, {**conventions, "sampler": sampler}, note)


def _unlike(name: str, config: dict[str, Any]) -> str:
    """A scheduler with those of its options that its sampler here does not have; "" where there are none."""
    found = [
        f"{option} {config.get(option, values[0])}"
        for option, values in SAME.get(name, {}).items()
        if config.get(option, values[0]) not in values[1:]
    ]
    return f"{name} with {', '.join(found)}" if found else ""


def _words(sampler: dict[str, Any]) -> str:
    options = ", ".join(f"{key}={value}" for key, value in sampler.items() if key not in ("name", "steps"))
    return f"{sampler['name']} ({options})" if options else sampler["name"]


def _variance(name: str, variance: Any) -> str:
    """The variance, for ddpm. Other schedulers may hold any value that was meant for one, and do not use it;
    solvers use whether the network puts one out, which they drop."""
    if name in ("DDPMScheduler", "DDPMParallelScheduler"):
        return VARIANCES[known("variance_type", variance, VARIANCES)]
    if name in SOLVERS and variance in ("learned", "learned_range"):
        return "learned_range"
    return "fixed_large" if variance == "fixed_large" else "fixed_small"


def _steps(T: int, sampler: dict[str, Any], pipeline: str | None) -> int:
    """The pipeline's number of steps, or fewer where the scheduler cannot take so many.

    With all T steps, an offset leads beyond the last timestep, and a solver's grid in diffusers would visit a
    timestep twice and divide by 0.
    """
    if pipeline is None:
        steps = T if sampler["name"] == "ddpm" else FEW_STEPS
    else:
        steps = PIPELINE_STEPS.get(pipeline, FEW_STEPS)
    skips_zero = sampler["name"] in ("dpm++", "unipc")
    even = skips_zero and (sampler["spacing"] != "trailing" or "sigmas" in sampler)
    offset = sampler.get("steps_offset", 0)
    if steps >= T and (even or offset):
        steps = FEW_STEPS
    steps = min(steps, T)
    points = steps + skips_zero  # a solver leaves out the one at 0
    while offset and steps > 1 and (points > T or (points - 1) * (T // points) + offset >= T):
        steps, points = steps - 1, points - 1
    return steps


def _grid(config: dict[str, Any], default: str) -> dict[str, Any]:
    """The spacing, and the offset where it has one."""
    spacing = known("timestep_spacing", config.get("timestep_spacing", default), SPACINGS)
    offset = config.get("steps_offset", 0) if spacing == "leading" else 0
    return {"spacing": spacing} | ({"steps_offset": offset} if offset else {})


def _ddpm(config: dict[str, Any]) -> dict[str, Any]:
    return {"name": "ddpm", **_grid(config, "leading"), "noise_in_last_step": True}


def _ddim(config: dict[str, Any]) -> dict[str, Any]:
    sampler = {"name": "ddim", **_grid(config, "leading"), "fixed_stride": True}
    return sampler if config.get("set_alpha_to_one", True) else sampler | {"set_alpha_to_one": False}


def _dpm_solver(config: dict[str, Any]) -> dict[str, Any]:
    algorithm = config.get("algorithm_type", "dpmsolver++")
    algorithms = ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis")
    known("algorithm_type", algorithm, algorithms)
    solver_type = config.get("solver_type", "midpoint")
    known("solver_type", solver_type, ("midpoint", "heun", "logrho", "bh1", "bh2"))
    options = {
        "sde": algorithm.startswith("sde-"),
        "algorithm": "dpmsolver++" if algorithm == "deis" else algorithm.removeprefix("sde-"),
        "solver_order": config.get("solver_order", 2),
        "solver_type": solver_type if solver_type == "heun" else "midpoint",  # as diffusers takes the others
        "sigmas": next((SIGMAS[key] for key in SIGMAS if config.get(key)), "timesteps"),
        "final_sigmas_type": config.get("final_sigmas_type", "zero"),
        "lower_order_final": config.get("lower_order_final", True),
        "euler_at_final": config.get("euler_at_final", False),
        "lambda_min_clipped": config.get("lambda_min_clipped", -float("inf")),
        "noise_in_last_step": algorithm.startswith("sde-"),
    }
    return {"name": "dpm++", **_grid(config, "linspace"), **_changed("dpm++", options)}


def _unipc(config: dict[str, Any]) -> dict[str, Any]:
    solver_type = config.get("solver_type", "bh2")
    known("solver_type", solver_type, ("bh1", "bh2", "midpoint", "heun", "logrho"))
    options = {
        "solver_order": config.get("solver_order", 2),
        "solver_type": solver_type if solver_type == "bh1" else "bh2",  # as diffusers takes the others
        "predict_x0": config.get("predict_x0", True),
        "final_sigmas_type": config.get("final_sigmas_type", "zero"),
        "lower_order_final": config.get("lower_order_final", True),
    }
    return {"name": "unipc", **_grid(config, "linspace"), **_changed("unipc", options)}


def _heun(config: dict[str, Any]) -> dict[str, Any]:
    return {"name": "heun", "spacing": _grid(config, "linspace")["spacing"]}


def _changed(sampler: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not the sampler's defaults."""
    defaults = SAMPLERS[sampler].__kwdefaults__ or {}
    return {key: value for key, value in options.items() if value != defaults[key]}


EXACT: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "DDPMScheduler": _ddpm,
    "DDPMParallelScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "DDIMParallelScheduler": _ddim,
    "DPMSolverMultistepScheduler": _dpm_solver,
    "HeunDiscreteScheduler": _heun,
    "UniPCMultistepScheduler": _unipc,
}
_NO_SIGMAS = {key: (False, False, None) for key in SIGMAS}
# Options of schedulers in EXACT whose other values its sampler does not have: the default, and those it has.
SAME: dict[str, dict[str, tuple[Any, ...]]] = {
    "HeunDiscreteScheduler": {
        "timestep_spacing": ("linspace", "leading", "trailing"),
        "steps_offset": (0, 0),
        **_NO_SIGMAS,
    },
    "UniPCMultistepScheduler": {"disable_corrector": ([], [], None), "solver_p": (None, None), **_NO_SIGMAS},
}


def _nearest(name: str, default_spacing: str, **options: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A sampler with these options, and the scheduler's own spacing."""
    return lambda config: {"name": name, **_grid(config, default_spacing), **options}


NEAREST: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "EulerDiscreteScheduler": _nearest("ddim", "linspace"),  # Euler's method in sigma is DDIM
    "EulerAncestralDiscreteScheduler": _nearest("ddpm", "linspace"),
    "KDPM2DiscreteScheduler": _nearest("dpm++", "linspace"),
    "KDPM2AncestralDiscreteScheduler": _nearest("dpm++", "linspace", sde=True),
    "LMSDiscreteScheduler": _nearest("dpm++", "linspace"),
    "DEISMultistepScheduler": _nearest("dpm++", "linspace"),
    "PNDMScheduler": _nearest("dpm++", "leading"),
    "DPMSolverSinglestepScheduler": _nearest("dpm++", "linspace"),
    "DPMSolverSDEScheduler": _nearest("dpm++", "linspace", sde=True),
    "SASolverScheduler": _nearest("dpm++", "linspace", sde=True),
    "LCMScheduler": _nearest("ddim", "leading"),
    "TCDScheduler": _nearest("ddim", "leading"),
}
OTHER_PROCESSES = ("EDM", "FlowM", "ScoreSde", "CMStochastic", "KarrasVe", "Cosine", "VQDiffusion", "SCM")
CLIPS = {  # whether a scheduler clips predictions by default; the others never do
    "DDPMScheduler": True,
    "DDPMParallelScheduler": True,
    "DDIMScheduler": True,
    "DDIMParallelScheduler": True,
    "HeunDiscreteScheduler": False,
    "LCMScheduler": False,
    "TCDScheduler": False,
}
SOLVERS = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler")


def _schedule(config: dict[str, Any]) -> NoiseSchedule:
    """The schedule with diffusers' rounding, on which its images depend."""
    T, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    ends = {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    if config.get("trained_betas") is not None:
        schedule = NoiseSchedule.from_betas(config["trained_betas"])
    elif known("beta_schedule", kind, BETA_SCHEDULES) == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(T)
    else:
        schedule = NoiseSchedule.from_config({"kind": kind, "T": T, **ends})
    if config.get("rescale_betas_zero_snr"):
        schedule = schedule.rescale_zero_terminal_snr()
    return schedule.in_float32()
