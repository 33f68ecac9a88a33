"""Training from Python: a model from images or a data set, by one call."""

import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from ..data.datasets import DatasetImages, LoadedSet, read_dataset
from ..data.image_folder import read_images, survey
from ..data.image_set import SomeImages, Survey
from ..ddpm import DDPM
from ..models.config import UNetConfig
from ..utils.device import resolve_device, torch_multiplies_bfloat16
from ..utils.validation import known_names, whole_number, whole_numbers
from . import loop
from .fitting import (
    HELD_OUT_SHARE,
    MAX_HELD_OUT,
    SMALL,
    listed,
    small_recipe,
    split,
    with_channels,
    with_classes,
)
from .images import images_as_tensor
from .outlook import disk_use, outlook
from .recipe import Recipe, load_recipe
from .state import read_state
from .trainer import Trainer


def train(
    data: Any,
    out: str | os.PathLike,
    labels: torch.Tensor | np.ndarray | Sequence[int] | None = None,
    *,
    recipe: str | Recipe | None = None,
    class_names: Sequence[str] | None = None,
    hold_out: int | None = None,
    workers: int = 0,
    stream: bool | None = None,
    resume: bool = False,
    accept_changes: bool = False,
    device: str | torch.device | None = None,
    autocast: torch.dtype | str | None = "auto",
    micro_batch: int | None = None,
    activation_checkpointing: bool = False,
    compile: bool = False,
    log_every: int = 50,
    validate_every: int = 500,
    save_every: int = 500,
    sample_every: int = 2500,
    measure_every: int = 2500,
    measure: loop.Measure | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    **changes: Any,
) -> DDPM:
    """Trains a model on images and returns it; the folder `out` gets it too, with log, grids and checkpoint.

    data: images uint8, a tensor [N, C, H, W] or an array [N, H, W, C], C = 1 or 3, with their `labels`; a
        folder or zip of images, class/name.jpg; or a data set of PyTorch or of Hugging Face, whose items are
        pairs, or dictionaries, of an image (of PIL, or uint8) and a label.
    labels: whole numbers from 0 on, [N], of a tensor or an array; without any, the model has no classes.
    recipe: a name, a `Recipe`, or by default "small-32" or "small-64", chosen by the size of the images. A
        recipe by name takes the channels and classes of the data. Images of a folder or data set that are of
        another size than the recipe's become the squares in their middle, scaled.
    class_names: of the labels 0, 1, ...; by default those that the folder or data set gives.
    hold_out: number of images, drawn by the recipe's seed, that are not trained on, and whose loss is logged;
        by default one of 20, and at most 1000.
    workers: processes that decode the images of a data set; 0 decodes in this process.
    stream: decode the images of a data set as the steps need them, by default if they would take more than a
        fourth of the free memory. The order, and so the model, is a function of the seed either way.
    resume, accept_changes: go on with the run in `out`, see `loop.train`; the recipe is by default the run's.
    device: by default "cuda" where there is one, otherwise "cpu".
    autocast: dtype of forward and backward, None for float32; "auto" is bfloat16 where the device multiplies
        in it.
    micro_batch, activation_checkpointing, compile: see `Trainer`.
    log_every, validate_every, save_every, sample_every, measure_every, measure, tensorboard: see
        `loop.train`.
    progress: tell what was found, and show bars.
    changes: fields of the recipe, such as steps=2000.

    ValueError for images, labels or a recipe that do not fit each other, and as from `loop.train`.
    """
    known_names("field of a recipe", changes, [entry.name for entry in fields(Recipe)])
    state = read_state(Path(out) / loop.STATE) if resume else None
    if state is not None and recipe is None:
        recipe = state["recipe"]
    found, name, recipe, about_size = _read(data, labels, recipe, workers, stream, progress)
    recipe = replace(recipe, **changes)
    names = class_names if class_names is not None else found.classes
    unused = found.labels is not None and recipe.unet.get("num_classes") is None
    if unused and labels is not None:
        raise ValueError(
            "there are labels, and the recipe has no classes: give its unet num_classes, or no labels"
        )
    if recipe.unet.get("num_classes") is None:
        found, names = found._replace(labels=None), None
    few = min(MAX_HELD_OUT, len(found.images) // HELD_OUT_SHARE)
    if state is not None:
        few = whole_number("hold_out", state["command"].get("hold_out", 0), 0)
    held_out = few if hold_out is None else whole_number("hold_out", hold_out, 0, len(found.images) - 1)
    images, numbers, validation = _held_out(found, held_out, recipe.seed)
    if name in SMALL and "batch_size" not in changes:
        recipe = replace(recipe, batch_size=min(recipe.batch_size, len(images)))
    device = resolve_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if autocast == "auto":
        autocast = torch.bfloat16 if torch_multiplies_bfloat16(device) else None
    elif not isinstance(autocast, torch.dtype | None):
        raise ValueError(f"autocast must be 'auto', a torch.dtype or None, not {autocast!r}")
    trainer = Trainer(
        recipe,
        images,
        numbers,
        validation,
        device,
        autocast=autocast,
        micro_batch=micro_batch,
        activation_checkpointing=activation_checkpointing,
        compile=compile,
        class_names=names,
        workers=workers,
        command={"hold_out": held_out},
    )
    if progress:
        classes = f"{recipe.unet['num_classes']} classes" if numbers is not None else "no labels"
        classes = "labels are not used" if unused else classes
        named = f": {listed(tuple(names))}" if names else ""
        height, width = found.images.shape[2:]
        held = f" ({held_out:,} held out)" if held_out else ""
        line = f"{found.name}: {len(found.images):,} images{held}, {width} x {height}{about_size}, {classes}"
        done = 0 if state is None else state["step"]
        tqdm.write(f"{line}{named}; {outlook(trainer, name, done)}", file=sys.stderr)
        tqdm.write(disk_use(trainer, out, done), file=sys.stderr)
    return loop.train(
        trainer,
        out,
        resume=resume,
        accept_changes=accept_changes,
        log_every=log_every,
        validate_every=validate_every,
        save_every=save_every,
        sample_every=sample_every,
        measure_every=measure_every,
        measure=measure,
        tensorboard=tensorboard,
        progress=progress,
    )


def _read(
    data: Any,
    labels: Any,
    recipe: str | Recipe | None,
    workers: int,
    stream: bool | None,
    progress: bool,
) -> tuple[LoadedSet, str | None, Recipe, str]:
    """The images, the recipe's name, the recipe that fits them, and a remark if the images were scaled."""
    chosen: list[tuple[str | None, Recipe]] = []
    scaled = ""

    def choose(found: Survey) -> tuple[int, tuple[int, int]]:
        """Chooses the recipe; gives the channels and the size of the images."""
        nonlocal scaled
        if isinstance(recipe, Recipe):
            chosen.append((None, recipe))
        elif recipe is None:
            chosen.append(small_recipe(found))
        else:
            fitted, _ = with_channels(load_recipe(recipe), found.channels, {}, "the data set")
            if not found.labelled:
                fitted = replace(fitted, unet=fitted.unet | {"num_classes": None})
            chosen.append((str(recipe), fitted))
        config = UNetConfig.from_dict(chosen[0][1].unet)
        if found.size != config.image_shape:
            scaled = " (the middle square, scaled)"
        return config.in_channels, config.image_shape

    if isinstance(data, str | os.PathLike):
        found = survey(data)
        channels, size = choose(found)
        if scaled and size[0] != size[1]:
            raise ValueError(f"the images are of other sizes than the recipe's, {size[1]} x {size[0]}")
        side = size[0] if scaled else None
        images = LoadedSet(*read_images(data, channels=channels, size=side, progress=progress))
    elif isinstance(data, torch.Tensor | np.ndarray):
        pixels = images_as_tensor(data)
        if pixels.ndim != 4 or not len(pixels):
            raise ValueError(f"images must be [N, C, H, W], or an array [N, H, W, C], not {[*pixels.shape]}")
        count, channels, height, width = pixels.shape
        numbers = None if labels is None else whole_numbers("labels", labels, 0, 2**31 - 1)
        if numbers is not None and len(numbers) != count:
            raise ValueError(f"there are {len(numbers)} labels for {count} images")
        choose(Survey(count, channels, (height, width), min(height, width), numbers is not None))
        if scaled:
            size = UNetConfig.from_dict(chosen[0][1].unet).image_shape
            raise ValueError(
                f"the images are {width} x {height}, and the recipe's {size[1]} x {size[0]}; scale them, or "
                "give them in a folder or data set, whose images are scaled"
            )
        images = LoadedSet(pixels, numbers, None, "the images")
    else:
        images = read_dataset(data, choose, workers=workers, stream=stream, progress=progress)
    if labels is not None and not isinstance(data, torch.Tensor | np.ndarray):
        raise ValueError("labels are for a tensor or an array of images; a folder or data set has its own")
    name, fitted = chosen[0]
    if not isinstance(recipe, Recipe) and fitted.unet.get("num_classes") is not None:
        fitted = with_classes(fitted, images, {})
    return images, name, fitted, scaled


def _held_out(
    found: LoadedSet, count: int, seed: int
) -> tuple[
    torch.Tensor | SomeImages | DatasetImages,
    torch.Tensor | None,
    tuple[torch.Tensor, torch.Tensor | None] | None,
]:
    """The images to train on, their labels, and the images and labels that are held out."""
    images, labels = found.images, found.labels
    if not count:
        return images, labels, None
    kept, held_out = split(len(images), count, seed)
    validation = images[held_out], None if labels is None else labels[held_out]
    some = images.some(kept) if isinstance(images, DatasetImages) else SomeImages(images, kept)
    return some, None if labels is None else labels[kept], validation
