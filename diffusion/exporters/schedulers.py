"""A model's own sampler as a pipeline of diffusers with one of its schedulers."""

import math
from typing import Any

import torch

from ..ddpm import DDPM
from ..importers.diffusers_scheduler import SIGMAS, read_scheduler
from ..kernels import StepCoefficients
from ..process.schedule import NoiseSchedule
from ..samplers import options_of
from ..utils.words import counted

# kind of schedule -> its name in diffusers, where the other arguments are the same
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "sigmoid": "sigmoid"}
_SPACINGS = ("leading", "linspace", "trailing")
_SAME = 1e-7  # of a step's coefficients
_CLIP = StepCoefficients._fields.index("clip_x0")


def scheduler_of(
    model: DDPM, sampler: str | None = None, steps: int | None = None
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(pipeline, scheduler, call): how diffusers samples as a sampler of the model does.

    sampler, steps: as those of `DDPM.steps`; by default the model's own.

    pipeline: the name of its class. scheduler: the scheduler's configuration. call: the arguments of the
    pipeline's call that are part of the sampler. ValueError naming the sampler or the option that no
    scheduler of diffusers has, also if the steps would be others for this number of steps.
    """
    name, steps, given = model.chosen_sampler(sampler, steps)
    if not isinstance(model.schedule, NoiseSchedule):
        raise ValueError("continuous noise levels cannot be exported: no pipeline of diffusers has them")
    if name not in _SCHEDULERS:
        raise ValueError(
            f"the sampler {name} cannot be exported: no pipeline of diffusers for a UNet2DModel calls its "
            f"scheduler; export another one by sampler and steps: {', '.join(_SCHEDULERS)}"
        )
    values = {option: parameter.default for option, parameter in options_of(name).items()}
    values |= {"clip": model.clip, "variance": model.variance} | given
    own = model.sampler if model.sampler and model.sampler["name"] == name else {}
    thresholds = own.get("dynamic_threshold") is not None
    if thresholds:
        values["clip"] = None
    if values["guidance_interval"] is not None:
        raise ValueError(
            "guidance_interval cannot be exported: diffusers' pipelines of images are not guided"
        )
    steps = model.schedule.T if steps is None else steps
    if values["spacing"] not in _SPACINGS and steps != model.schedule.T:
        raise ValueError(
            f"spacing {values['spacing']!r} cannot be exported: diffusers has {', '.join(_SPACINGS)}"
        )
    pipeline, make = _SCHEDULERS[name]
    scheduler, call = make(values)
    scheduler |= _betas(model.schedule, scheduler["_class_name"])
    if thresholds:
        bound = min(own.get("dynamic_threshold_max", math.inf), torch.finfo(torch.float32).max)
        scheduler |= _threshold(own["dynamic_threshold"], bound)
    scheduler["prediction_type"] = model.prediction_type
    scheduler["steps_offset"] = values["steps_offset"]
    _set_spacing(scheduler, values["spacing"], steps, model.schedule.T)
    _check_variance(model, name, values, scheduler)
    _check_steps(model, name, steps, scheduler, call)
    return pipeline, scheduler, {"num_inference_steps": steps} | call


def _ddpm(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": values["variance"]}
    return scheduler | _clip(values["clip"]), {}


def _ddim(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    scheduler = {"_class_name": "DDIMScheduler", "set_alpha_to_one": values["set_alpha_to_one"]}
    call = {"eta": values["eta"], "use_clipped_model_output": values["use_clipped_model_output"]}
    return scheduler | _clip(values["clip"]), call


def _dpm_solver(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    scheduler = {
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": ("sde-" if values["sde"] else "") + values["algorithm"],
        **{name: values[name] for name in ("solver_order", "solver_type", "final_sigmas_type")},
        **{name: values[name] for name in ("lower_order_final", "euler_at_final")},
    }
    for option, sigmas in SIGMAS.items():
        if values["sigmas"] == sigmas:
            scheduler[option] = True
    if values["lambda_min_clipped"] != -math.inf:
        scheduler["lambda_min_clipped"] = values["lambda_min_clipped"]
    clip = values["clip"]
    if clip not in (None, math.inf, 1):
        raise ValueError(f"clip={clip} cannot be exported: diffusers' DPM-Solver clips to 1 or not at all")
    if clip == 1:  # its threshold is at least 1 and at most sample_max_value
        scheduler |= _threshold(0.995, 1.0)
    return scheduler, {}


# sampler -> its pipeline, and the function that gives a scheduler's configuration and the call's arguments
_SCHEDULERS = {
    "ddpm": ("DDPMPipeline", _ddpm),
    "ddim": ("DDIMPipeline", _ddim),
    "dpm++": ("DDPMPipeline", _dpm_solver),  # a DDIMPipeline would replace the scheduler
}


def _clip(clip: float | None) -> dict[str, Any]:
    if clip is None or clip == math.inf:
        return {"clip_sample": False}
    return {"clip_sample": True, "clip_sample_range": clip}


def _threshold(ratio: float, bound: float) -> dict[str, Any]:
    return {"thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": bound}


def _betas(schedule: NoiseSchedule, scheduler: str) -> dict[str, Any]:
    config = schedule.to_config()
    options: dict[str, Any] = {"num_train_timesteps": schedule.T}
    if config.pop("zero_terminal_snr", False):
        options["rescale_betas_zero_snr"] = True
    config.pop("float32", None)  # diffusers computes all schedules in float32
    kind = config["kind"]
    if kind in _BETA_SCHEDULES and (kind != "sigmoid" or scheduler == "DDPMScheduler"):
        ends = {"beta_start": config["beta_start"], "beta_end": config["beta_end"]}
        return options | {"beta_schedule": _BETA_SCHEDULES[kind]} | ends
    if config == NoiseSchedule.cosine(schedule.T).to_config():
        return options | {"beta_schedule": "squaredcos_cap_v2"}
    return options | {"trained_betas": NoiseSchedule.from_config(config).betas.tolist()}


def _set_spacing(scheduler: dict[str, Any], spacing: str, steps: int, T: int) -> None:
    """Sets the spacing; where all timesteps are visited, to one with which diffusers visits all, too."""
    if steps == T and not scheduler["steps_offset"]:
        spacing = "trailing" if scheduler["_class_name"].startswith("DPM") else "leading"
    scheduler["timestep_spacing"] = spacing


def _check_variance(model: DDPM, name: str, values: dict[str, Any], scheduler: dict[str, Any]) -> None:
    """ValueError unless the scheduler leaves out the variance that a network puts out, or uses it."""
    config = model.unet.config
    if not config.learned_variance or (name == "ddpm" and values["variance"] == "learned_range"):
        return
    if name == "dpm++" and config.in_channels == 3 and model.prediction_type == "epsilon":
        scheduler["variance_type"] = "learned_range"
        return
    raise ValueError(
        f"the sampler {name} cannot be exported for a network with a learned variance: diffusers' "
        f"{scheduler['_class_name']} does not take its output"
    )


def _check_steps(model: DDPM, name: str, steps: int, scheduler: dict[str, Any], call: dict[str, Any]) -> None:
    """ValueError unless the scheduler, as the importer reads it, has the model's schedule and its steps."""
    read = read_scheduler(scheduler)
    conventions = read.conventions | {"sampler": read.conventions["sampler"] | {"steps": steps}}
    theirs = DDPM(model.unet, model.schedule, **conventions).steps(name, **call).table
    ours = model.steps(name, steps).table
    if scheduler.get("thresholding"):  # takes the place of clipping
        ours[:, _CLIP], theirs[:, _CLIP] = math.inf, math.inf
    same = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=_SAME, atol=_SAME)
    near = torch.allclose(read.schedule.alphas_cumprod, model.schedule.alphas_cumprod, rtol=1e-3, atol=1e-6)
    if not same or not near:
        raise ValueError(
            f"the sampler {name} with its options and {counted(steps, 'step')} cannot be "
            "exported: diffusers' "
            f"{scheduler['_class_name']} takes other steps"
        )
