"""Fast sampling and training of pixel-space diffusion models with classifier-free guidance."""

from pathlib import Path
from typing import TYPE_CHECKING

from .utils.modules import importing

__version__ = "0.2.0.dev0"

if not (Path(__file__).parent / "kernels").is_dir():
    # In a clone, kernels/ lies beside this folder; in an installation, within it.
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:  # `__getattr__` imports each name when it is first used
    from . import kernels as kernels
    from . import samplers as steps
    from .certificates import certify
    from .ddpm import DDPM, load
    from .exporters.diffusers import to_diffusers
    from .exporters.onnx import to_onnx
    from .exporters.program import to_exported_program
    from .models.unet import UNet, UNetConfig
    from .planner.accelerate import accelerate, restore
    from .process.interpolation import slerp
    from .process.schedule import NoiseSchedule
    from .samplers import StepTable
    from .storage.images import save_gif, save_grid
    from .training.from_data import train
    from .training.recipe import Recipe
    from .training.trainer import Trainer

__all__ = [
    "DDPM",
    "NoiseSchedule",
    "Recipe",
    "StepTable",
    "Trainer",
    "UNet",
    "UNetConfig",
    "accelerate",
    "certify",
    "kernels",
    "load",
    "restore",
    "save_gif",
    "save_grid",
    "slerp",
    "steps",
    "to_diffusers",
    "to_exported_program",
    "to_onnx",
    "train",
]

# The module that defines each public name that is no module itself.
_MODULES = {
    "DDPM": "ddpm",
    "NoiseSchedule": "process.schedule",
    "Recipe": "training.recipe",
    "StepTable": "samplers",
    "Trainer": "training.trainer",
    "UNet": "models.unet",
    "UNetConfig": "models.unet",
    "accelerate": "planner.accelerate",
    "certify": "certificates",
    "load": "ddpm",
    "restore": "planner.accelerate",
    "save_gif": "storage.images",
    "save_grid": "storage.images",
    "slerp": "process.interpolation",
    "to_diffusers": "exporters.diffusers",
    "to_exported_program": "exporters.program",
    "to_onnx": "exporters.onnx",
    "train": "training.from_data",
}


__getattr__ = importing(__name__, _MODULES)  # so that `diffusion --help` loads no PyTorch


def __dir__() -> list[str]:
    return [*__all__, "__doc__", "__version__"]
