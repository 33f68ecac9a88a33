"""Reads objects of diffusers in memory: a pipeline, or a UNet2DModel with a scheduler."""

import json
from pathlib import Path
from typing import Any

import torch

from ..models.registry import build_on_meta
from ..models.unet import UNet
from ..storage.reading import load_weights
from ..utils.validation import known_names, shown
from .diffusers import FLAGS, assumed_classes, check_fit, is_unchosen, read_schedule, unet_options
from .diffusers_files import check_components, located
from .diffusers_unet import convert_weights, unet_config
from .imported import Imported

PLACES = ("weights", "variant")  # flags that choose among files


def read_object(model: Any, scheduler: Any = None, flags: dict[str, Any] | None = None) -> Imported:
    """A pipeline of a UNet2DModel and a scheduler, or such a UNet, with a copy of its weights in float32.

    scheduler: as for `scheduler_config`; by default the pipeline's. flags: those of `diffusers.FLAGS` that
    say nothing of files. The conventions are those of the same pipeline in a folder. TypeError for another
    object. ValueError, in one line, for a pipeline with another component, a network or an option that cannot
    be represented, or a UNet without a scheduler.
    """
    flags = dict(flags or {})
    known_names("flag", flags, [name for name in FLAGS if name not in PLACES])
    unet = model = _uncompiled(model)
    pipeline, kind = None, Path(type(model).__name__)
    given = flags.pop("schedule", None)
    scheduler = given if scheduler is None else scheduler
    if isinstance(getattr(model, "components", None), dict) and "scheduler" in model.components:
        check_components(kind, {name: _kind(part) for name, part in model.components.items()})
        unet = _uncompiled(model.components.get("unet"))
        pipeline = type(model).__name__ if is_unchosen(scheduler) else None
        scheduler = model.components["scheduler"] if scheduler is None else scheduler
    if not isinstance(unet, torch.nn.Module) or not hasattr(unet, "to_json_string"):
        raise TypeError(
            "a model is loaded by the name of a bundled one, a file, a folder or hf:owner/name, or from a "
            f"pipeline or UNet2DModel of diffusers, not from {shown(model)}"
        )
    if scheduler is None:
        raise ValueError(f"{kind} holds no noise schedule; give scheduler=, a scheduler of diffusers")
    schedule = scheduler_config(scheduler)
    network, assumed = _unet(unet, kind, flags)
    own = {name: flags[name] for name in ("num_train_timesteps", "prediction_type") if name in flags}
    path, config, about = read_schedule(own | {"schedule": schedule}, network)
    found = located(path, check_fit, network, config, pipeline)
    return Imported(network, found.schedule, found.conventions, assumed | about, found.note)


def scheduler_config(scheduler: Any) -> dict[str, Any] | str:
    """The configuration of a scheduler of diffusers, which may also be given as a dictionary, file or name.

    TypeError for anything else.
    """
    if isinstance(scheduler, dict | str):
        return scheduler
    if not hasattr(scheduler, "to_json_string") or isinstance(scheduler, type):
        raise TypeError(
            f"scheduler must be a scheduler of diffusers or its configuration, not {shown(scheduler)}"
        )
    return json.loads(scheduler.to_json_string())


def _kind(part: Any) -> list[str] | None:
    """A component as model_index.json names it."""
    return None if part is None else [type(part).__module__.partition(".")[0], type(part).__name__]


def _uncompiled(module: Any) -> Any:
    """The module that torch.compile has wrapped, or the same object."""
    return getattr(module, "_orig_mod", module)


def _unet(unet: Any, kind: Path, flags: dict[str, Any]) -> tuple[UNet, dict[str, Any]]:
    """The network, and what was assumed of it."""
    config = located(kind, unet_config, json.loads(unet.to_json_string()), **unet_options(flags))
    network = located(kind, build_on_meta, config)
    assert isinstance(network, UNet)
    tensors = {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in unet.state_dict().items()}
    converted = convert_weights(config, tensors, str(kind), null_label=flags.get("null_label"))
    load_weights(network, converted, kind)
    return network, assumed_classes(config, flags)
