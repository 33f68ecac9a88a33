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

from ..data.datasets import DatasetImages, LoadedSet, is_dataset, read_dataset
from ..data.image_folder import read_images, survey
from ..data.image_set import SomeImages, Survey
from ..ddpm import DDPM
from ..models.class_names import check_names
from ..models.config import UNetConfig
from ..utils.device import resolve_device, torch_multiplies_bfloat16
from ..utils.validation import known_names, refuse, shown, whole_number, whole_numbers
from ..utils.words import counted
from . import loop
from .fitting import (
    SMALL,
    about_classes,
    as_in_run,
    check_apart,
    held_out_by_default,
    labels_by_name,
    mirroring_colour,
    most_held_out,
    small_recipe,
    split,
    with_channels,
    with_classes,
)
from .images import images_as_tensor
from .outlook import disk_use, outlook
from .recipe import Recipe, load_recipe
from .state import read_state
from .tensorboard_log import summary_writer
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
    class_names: of the labels 0, 1, ...; by default those that the folder or data set gives. Where it gives
        names, they are another order of the same, perhaps with classes that have no images.
    hold_out: number of images, drawn by the recipe's seed, that are not trained on, and whose loss is logged;
        by default one of 20, and at most 1000. A resumed run holds out the same.
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
    if not isinstance(out, str | os.PathLike):
        raise ValueError(f"out must be the path of a folder, not {shown(out)}")
    own_labels = isinstance(data, str | os.PathLike) or is_dataset(data)
    if labels is not None and own_labels and not isinstance(data, torch.Tensor | np.ndarray):
        raise ValueError("labels are for a tensor or an array of images; a folder or data set has its own")
    if isinstance(data, str | os.PathLike):
        check_apart(data, out)
    if not resume:
        loop.check_free(out)
    if tensorboard:
        summary_writer()
    state = read_state(Path(out) / loop.STATE) if resume else None
    if state is not None and recipe is None:
        recipe = state["recipe"]
    found, name, recipe, about_size = _read(data, labels, recipe, workers, stream, progress)
    if class_names is not None and found.labels is not None:
        found = _named(found, class_names)
    if state is not None:
        found = as_in_run(found, state, f"the run in {out}")
    if name is not None and recipe.unet.get("num_classes") is not None:
        recipe = with_classes(recipe, found, {})
    recipe, names = replace(recipe, **changes), found.classes
    unused = found.labels is not None and recipe.unet.get("num_classes") is None
    if unused and labels is not None:
        raise ValueError(
            "there are labels, and the recipe has no classes: give its unet num_classes, or no labels"
        )
    if recipe.unet.get("num_classes") is None:
        found, names = found._replace(labels=None), None
    few = held_out_by_default(len(found.images), found.labels)
    if state is not None:
        few = whole_number("hold_out", state["command"].get("hold_out", 0), 0)
    most = most_held_out(len(found.images), found.labels)
    held_out = few if hold_out is None else whole_number("hold_out", hold_out, 0, most)
    command = {} if state is None else state["command"]
    held_out_seed = command.get("hold_out_seed", recipe.seed if state is None else state["recipe"].seed)
    images, numbers, validation = _held_out(found, held_out, held_out_seed)
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
        command={"recipe_name": name} | command | {"hold_out": held_out, "hold_out_seed": held_out_seed},
    )
    if progress:
        classes = "labels are not used" if unused else "no labels"
        if numbers is not None:
            classes = about_classes(names, numbers, recipe.unet["num_classes"])
        height, width = found.images.shape[2:]
        held = f" ({held_out:,} held out)" if held_out else ""
        size = f"{width} x {height}{about_size}{found.remark}"
        line = f"{found.name}: {counted(len(found.images), 'image')}{held}, {size}"
        done = 0 if state is None else state["step"]
        tqdm.write(f"{line}, {classes}; {outlook(trainer, name, done)}", file=sys.stderr)
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
            chosen.append((str(recipe), mirroring_colour(fitted, str(recipe), found.channels)))
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
        if channels not in (1, 3) and not isinstance(recipe, Recipe):
            raise ValueError(
                f"images have 1 or 3 channels, [N, C, H, W] or an array [N, H, W, C], and these are "
                f"{[*data.shape]}; leave out transparency by images[..., :3]"
            )
        numbers = None if labels is None else whole_numbers("labels", labels, 0, 2**31 - 1)
        if numbers is not None and len(numbers) != count:
            raise ValueError(f"labels must be {count}, one for each image, not {len(numbers)}")
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
    name, fitted = chosen[0]
    return images, name, fitted, scaled


def _named(found: LoadedSet, class_names: Sequence[str]) -> LoadedSet:
    """The images with these names of the classes, by which labels with other names change."""
    if isinstance(class_names, str) or not isinstance(class_names, Sequence):
        refuse("class_names", "a list of different names", class_names)
    names = check_names(class_names, len(class_names))
    return found._replace(classes=names, labels=labels_by_name(found, names, "class_names"))


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
    kept, held_out = split(len(images), count, seed, labels)
    validation = images[held_out], None if labels is None else labels[held_out]
    some = images.some(kept) if isinstance(images, DatasetImages) else SomeImages(images, kept)
    return some, None if labels is None else labels[kept], validation
