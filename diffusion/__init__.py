"""Fast sampling and training of pixel-space diffusion models with classifier-free guidance."""

import sys
from pathlib import Path

__version__ = "0.2.0.dev0"

if not (Path(__file__).parent / "kernels").is_dir():
    # In a clone, kernels/ lies beside this folder; in an installation, within it.
    __path__.append(str(Path(__file__).parents[1]))

from . import kernels
from . import samplers as steps
from .certificates import certify
from .ddpm import DDPM, load
from .exporters.diffusers import to_diffusers
from .exporters.onnx import to_onnx
from .exporters.program import to_exported_program
from .models.unet import UNet, UNetConfig
from .planner.accelerate import accelerate, restore
from .process.schedule import NoiseSchedule
from .samplers import StepTable
from .storage.images import save_gif, save_grid

sys.modules[f"{__name__}.steps"] = steps  # `from diffusion.steps import ddim` finds it

__all__ = [
    "DDPM",
    "NoiseSchedule",
    "StepTable",
    "UNet",
    "UNetConfig",
    "accelerate",
    "certify",
    "kernels",
    "load",
    "restore",
    "save_gif",
    "save_grid",
    "steps",
    "to_diffusers",
    "to_exported_program",
    "to_onnx",
]
