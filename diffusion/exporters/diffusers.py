"""Writes a model as a pipeline folder of diffusers, without diffusers.

model_index.json            the pipeline, and what a pipeline's files do not hold, under EXPORTED
unet/config.json            a UNet2DModel
unet/diffusion_pytorch_model.safetensors
scheduler/scheduler_config.json
"""

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from ..ddpm import DDPM
from ..importers.diffusers_files import EXPORTED
from ..models.config import UNetConfig
from ..models.structure import altered, config_of
from ..models.unet import UNet
from ..process.value_range import SIGNED
from ..storage.atomic import replacing
from ..storage.checkpoint import is_model
from ..storage.reading import check_finite, check_weights, sha256
from ..utils.validation import plain_number
from .schedulers import scheduler_of
from .unet2d import unet2d_config, unet2d_weights

FILES = (
    "unet/diffusion_pytorch_model.safetensors",
    "unet/config.json",
    "scheduler/scheduler_config.json",
    "model_index.json",
)


def to_diffusers(
    model: DDPM, folder: str | os.PathLike, *, sampler: str | None = None, steps: int | None = None
) -> dict[str, Any]:
    """Writes a model as a folder that diffusers loads, complete or not at all.

    sampler, steps: as those of `DDPM.steps`; by default the model's own.

    The pipeline is a DDIMPipeline for DDIM, else a DDPMPipeline, with the scheduler of the sampler. The
    result holds the arguments with which calling the pipeline gives the model's images, such as
    {"num_inference_steps": 10}; a pipeline's files do not hold them. The pipelines of diffusers take no
    labels: for a conditional model call its `unet` with `class_labels`, of which the number of classes stands
    for no label where the model has a null label.

    `load` reads such a folder as the same model.

    ValueError naming what diffusers cannot express: a network that is not a UNet, or was altered; an option
    of the UNet; a sampler whose steps no scheduler of diffusers takes; images that are diffused outside
    [-1, 1]. Also if the folder cannot be written, holds a model of this package, or the weights are not
    finite.
    """
    if not os.fspath(folder):
        raise ValueError("cannot write a pipeline: the name of its folder is empty")
    folder = Path(folder)
    if is_model(folder):
        raise ValueError(f"cannot write {folder}: it holds a model of this package; choose another folder")
    unet = getattr(model.unet, "_orig_mod", model.unet)  # the module that torch.compile wraps
    config = config_of(unet)
    if not isinstance(config, UNetConfig) or not isinstance(unet, UNet):
        raise ValueError(
            f"a network of class {type(unet).__name__} cannot be exported to diffusers: "
            "its pipelines have a UNet2DModel"
        )
    if reason := altered(unet):
        raise ValueError(f"the network cannot be exported to diffusers: {reason}")
    if model.diffused_range != SIGNED:
        raise ValueError(
            f"value_range={list(model.value_range)} with normalize=False cannot be exported: "
            "diffusers' pipelines diffuse images in [-1, 1]"
        )
    options = unet2d_config(config)
    pipeline, scheduler, call = scheduler_of(model, sampler, steps)
    weights = unet2d_weights(config, unet.state_dict())
    weights = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in weights.items()}
    check_weights(weights, f"cannot write {folder}")
    check_finite(weights, f"cannot write {folder}")
    with replacing(*(folder / name for name in FILES)) as (weights_path, config_path, *paths):
        scheduler_path, index_path = paths
        save_file(weights, weights_path, {"format": "pt"})
        _write_json(config_path, options)
        _write_json(scheduler_path, scheduler)
        own = {
            "null_label": config.null_label,
            "scheduler_sha256": sha256(scheduler_path),
            "schedule": model.schedule.to_config(),
            "conventions": model.conventions(),
        }
        index = {
            "_class_name": pipeline,
            "unet": ["diffusers", "UNet2DModel"],
            "scheduler": ["diffusers", scheduler["_class_name"]],
            EXPORTED: own,  # diffusers ignores names that begin with "_"
        }
        _write_json(index_path, index)
    return call


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, default=plain_number) + "\n")
