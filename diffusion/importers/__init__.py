"""Readers of checkpoints in other projects' formats. `read` finds out a model's format by itself."""

import os
from typing import Any

from ..models.unet import UNet
from ..process.schedule import NoiseSchedule
from ..storage import checkpoint
from . import diffusers


def read(name: str | os.PathLike, verify: bool = True) -> tuple[UNet, NoiseSchedule, dict[str, Any]]:
    """Reads a model: its UNet in float32 on the CPU, its noise schedule, and the conventions of its training.

    name: a bundled model's name, a model folder, a diffusers folder, or "hf:owner/name" for either on the
    Hugging Face hub (needs huggingface_hub). The conventions are those arguments of `DDPM` which the
    checkpoint has. verify: see `checkpoint.read`. ValueError, in one line, for anything that is missing,
    damaged, or not a model.
    """
    folder = checkpoint.locate(name)
    if not checkpoint.is_model(folder) and diffusers.is_diffusers(folder):
        return diffusers.load(folder)
    return checkpoint.read(folder, verify)
