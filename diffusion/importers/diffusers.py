"""Reads the folders of diffusers: pipelines of a UNet2DModel and a scheduler, and their parts."""

from pathlib import Path
from typing import Any

from ..models.config import UNetConfig
from ..models.registry import build_on_meta
from ..models.unet import UNet
from ..process.schedule import NoiseSchedule
from ..storage.checkpoint import OPTIONAL, REQUIRED
from ..storage.reading import load_weights, read_json
from ..utils.validation import known_names, typed
from ..utils.words import counted
from .checkpoint_file import Checkpoint
from .diffusers_files import EXPORTED, UNETS, Layout, exported, find, is_unet, located, read_weights
from .diffusers_scheduler import Scheduler, read_scheduler
from .diffusers_unet import ASSUMED_CLASSES, convert_weights, unet_config
from .flags import image_size
from .imported import Imported

NAME = "diffusers"
HUB_FILES: tuple[str, ...] = ("*.json", "*model*.safetensors", "*model*.bin")
FLAGS: dict[str, str] = {
    "schedule": "linear, scaled_linear, cosine or sigmoid, or a scheduler_config.json, where there is none",
    "num_train_timesteps": "number of timesteps of a schedule that is given by its name (1000)",
    "prediction_type": "epsilon, sample or v_prediction, of a schedule that is given by its name (epsilon)",
    "size": "height and width of the images, such as 32 or 32x48, where sample_size is null",
    "weights": "unet or unet_ema, where there are both",
    "variant": "the variant of the weights, such as fp16 (those without a variant, if there are such)",
    "null_label": "the label of no class, for guidance; the labels after it move down by one",
    "num_classes": f"number of labels of a class_embed_type 'timestep' ({ASSUMED_CLASSES})",
}
_NAMED_SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
    "squaredcos_cap_v2": "squaredcos_cap_v2",
    "sigmoid": "sigmoid",
}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether a folder is a pipeline or a model of diffusers, or a file the weights of one."""
    path = checkpoint.path
    if not checkpoint.is_folder:
        return path.suffix in (".safetensors", ".bin") and is_unet(path.parent)
    parts = (path, *(path / part for part in UNETS))
    return (path / "model_index.json").is_file() or any(map(is_unet, parts))


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """A pipeline's UNet in float32 on the CPU, its noise schedule, and the conventions of its training.

    checkpoint: a pipeline's folder, with `unet/` and `scheduler/`, or the files of both side by side; a
    `checkpoint-N/` of diffusers' training script, whose `unet_ema/` is preferred; a UNet's folder alone, or
    its file of weights. flags: see FLAGS. The conventions are "prediction_type" ("epsilon", "sample" or
    "v_prediction"), "variance" ("fixed_small", "fixed_large" or "learned_range"), "clip" (the largest
    absolute value of a predicted image, or None) and "sampler", which gives the pipeline's own images.
    ValueError, in one line: a file that is missing or damaged, a component or an option that cannot be
    represented, or an unknown flag.
    """
    known_names("flag", flags, FLAGS)
    layout = find(checkpoint, flags.get("weights"))
    assumed = {} if layout.chosen is None else {"weights": layout.chosen}
    own = exported(layout)
    if own.get("null_label") is not None:
        flags = {"null_label": own["null_label"]} | flags
    unet, found = _unet(layout, flags)
    path, config, about = _scheduler_config(layout, unet, flags)
    pipeline = layout.pipeline if is_unchosen(flags.get("schedule")) else None
    scheduler = located(path, check_fit, unet, config, pipeline)
    schedule, conventions = scheduler.schedule, scheduler.conventions
    if "conventions" in own and "schedule" not in flags:  # exact, where a scheduler's file is rounded
        index = layout.folder / "model_index.json"
        schedule = located(index, NoiseSchedule.from_config, own.get("schedule"))
        stored = located(index, typed, f"conventions of {EXPORTED}", own["conventions"], dict)
        conventions = {key: stored[key] for key in (*REQUIRED, *OPTIONAL) if key in stored}
    return Imported(unet, schedule, conventions, assumed | found | about, scheduler.note)


def check_fit(unet: UNet, config: dict[str, Any], pipeline: str | None) -> Scheduler:
    """`read_scheduler`, whose variance and timesteps must be the UNet's; ValueError otherwise."""
    scheduler = read_scheduler(config, pipeline)
    variance, T = scheduler.conventions["variance"], scheduler.schedule.T
    if unet.config.learned_variance != (variance == "learned_range"):
        raise ValueError(
            f"a variance of type {variance!r} does not go with a UNet of "
            f"{counted(unet.config.in_channels, 'channel')} in and {unet.config.out_channels} out"
        )
    rows = unet.config.learned_timesteps
    if rows is not None and rows < T:
        raise ValueError(
            f"the UNet has learned {counted(rows, 'timestep')}, fewer than the {T} of the schedule"
        )
    return scheduler


def unet_options(flags: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `unet_config` among the flags."""
    options: dict[str, Any] = {name: flags[name] for name in ("num_classes", "null_label") if name in flags}
    if "size" in flags:
        options["size"] = image_size("size", flags["size"])
    return options


def assumed_classes(config: UNetConfig, flags: dict[str, Any]) -> dict[str, Any]:
    """The number of classes, where neither a flag nor the configuration of diffusers gives it."""
    if config.label_embedding == "timestep" and "num_classes" not in flags:
        return {"num_classes": config.num_classes}
    return {}


def _unet(layout: Layout, flags: dict[str, Any]) -> tuple[UNet, dict[str, Any]]:
    """The UNet of a layout, and what was assumed of it."""
    path = layout.unet / "config.json"
    config = located(path, unet_config, read_json(path), **unet_options(flags))
    weights, tensors, variant = read_weights(layout, flags.get("variant"))
    assumed: dict[str, Any] = {} if variant is None or "variant" in flags else {"variant": variant}
    assumed |= assumed_classes(config, flags)
    unet = located(path, build_on_meta, config)
    assert isinstance(unet, UNet)
    converted = convert_weights(config, tensors, str(weights), null_label=flags.get("null_label"))
    load_weights(unet, converted, weights)
    return unet, assumed


def _scheduler_config(
    layout: Layout, unet: UNet, flags: dict[str, Any]
) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The scheduler's configuration, the file that errors name, and what was assumed of it."""
    if flags.get("schedule") is not None:
        return read_schedule(flags, unet)
    _check_named(flags, False)
    if layout.scheduler is None:
        raise ValueError(
            f"{layout.folder} has no scheduler_config.json, so its noise schedule is unknown; give the "
            f"flag schedule (--schedule): {', '.join(_NAMED_SCHEDULES)}, or a scheduler_config.json"
        )
    return layout.scheduler, _with_class(layout.scheduler, read_json(layout.scheduler)), {}


def is_unchosen(schedule: Any) -> bool:
    """Whether a flag `schedule` leaves the scheduler's class to the pipeline: none, or betas only."""
    return schedule is None or (isinstance(schedule, str) and schedule in _NAMED_SCHEDULES)


def _check_named(flags: dict[str, Any], named: bool) -> None:
    """ValueError for flags that belong to a schedule by name where there is none."""
    for name in ("num_train_timesteps", "prediction_type"):
        if name in flags and not named:
            raise ValueError(
                f"flag {name} belongs to a schedule that is given by its name; see flag schedule"
            )


def read_schedule(flags: dict[str, Any], unet: UNet) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The scheduler's configuration by the flag `schedule`: a name, a file or the configuration itself.

    Also the file that errors name, and what was assumed.
    """
    given = flags["schedule"]
    named = isinstance(given, str) and given in _NAMED_SCHEDULES
    _check_named(flags, named)
    if named:
        assumed = {"num_train_timesteps": 1000, "prediction_type": "epsilon"}
        config = {
            "_class_name": "DDPMScheduler",
            "beta_schedule": _NAMED_SCHEDULES[given],
            "variance_type": "learned_range" if unet.config.learned_variance else "fixed_small",
            **{name: flags.get(name, value) for name, value in assumed.items()},
        }
        path, assumed = Path("schedule"), {k: v for k, v in assumed.items() if k not in flags}
    elif isinstance(given, dict):
        path, config, assumed = Path("schedule"), _with_class("schedule", given), {}
    else:
        path = Path(typed("flag schedule", given, str))
        path = path / "scheduler_config.json" if path.is_dir() else path
        if not path.exists():
            known = ", ".join(_NAMED_SCHEDULES)
            raise ValueError(f"unknown schedule {given!r}: no such file; schedules by name: {known}")
        config, assumed = _with_class(path, read_json(path)), {}
    return path, config, assumed


def _with_class(where: Path | str, config: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's configuration. ValueError, naming its file, where it lacks the scheduler's class."""
    if "_class_name" not in config:
        raise ValueError(
            f"{where}: a scheduler's configuration needs its _class_name, which scheduler.config of a new "
            "scheduler does not hold; give the scheduler itself, or the file that it saves"
        )
    return config
