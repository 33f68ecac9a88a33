"""load: a model by its name, folder, file or object."""

import os
import warnings
from typing import Any, NoReturn

import torch

from .. import importers
from ..importers.diffusers_words import refuse_loading
from ..utils.device import resolve_device
from .model import DDPM


def load(
    name: str | os.PathLike | Any,
    device: str | torch.device | None = None,
    *,
    scheduler: Any = None,
    verify: bool = True,
    flags: dict[str, Any] | None = None,
    **unknown: NoReturn,
) -> DDPM:
    """Loads a model: a bundled one such as "mnist", a model folder, "hf:owner/name", a foreign checkpoint, or
    a pipeline or UNet2DModel of diffusers in memory, whose weights are copied.

    device: where to put the model; by default the device of an object, and the CPU for all else.
    scheduler: a scheduler of diffusers, or its configuration, by which the model samples, instead of the
        pipeline's; a UNet2DModel alone needs it.
    verify: compare the weights with the SHA-256 in config.json, if it holds one; False takes any weights.
    flags: settings that a foreign checkpoint does not hold, by name, such as {"class_cond": True}; see
        `diffusion.importers`. A UserWarning names the values that are assumed for all others.

    ValueError if the model is missing or damaged, or the file or folder is not a model. TypeError for an
    object that is none of these, or another keyword; one of diffusers gets what to write here.
    """
    refuse_loading(unknown)
    if isinstance(name, str | os.PathLike):
        if scheduler is not None:
            flags = (flags or {}) | {"schedule": importers.scheduler_config(scheduler)}
        device = resolve_device("cpu" if device is None else device)
        imported = importers.read(name, verify=verify, flags=flags)
    else:
        imported = importers.read_object(name, scheduler, flags)
        device = resolve_device(getattr(name, "device", "cpu") if device is None else device)
        name = type(name).__name__
    if assumed := imported.assumed_text():
        warnings.warn(f"{name} does not say how it was trained; assumed: {assumed}", stacklevel=2)
    if imported.note:
        warnings.warn(f"{name}: {imported.note}", stacklevel=2)
    try:
        model = DDPM(imported.unet, imported.schedule, **imported.conventions)
    except ValueError as error:
        raise ValueError(f"the configuration of {name}: {error}") from error
    return model.to(device).eval()
