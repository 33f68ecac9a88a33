"""Recipes that fit data: the network for images of any size, and the channels and classes of the data."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from ..data import NAMED_SETS, ImageSet
from ..data.datasets import LoadedSet
from ..data.image_files import is_hidden
from ..data.image_set import Survey
from ..models.config import UNetConfig
from ..utils.words import counted
from .recipe import Recipe, load_recipe
from .seeds import seed_of

# The recipes for images of any size: the largest side of the images that each keeps as they are.
SMALL = {"small-32": 40, "small-64": 64}
HELD_OUT_SHARE, MAX_HELD_OUT = 20, 1000  # one image of twenty is held out, and at most so many
MAX_NAMED = 10  # classes named in a message


def small_recipe(found: Survey) -> tuple[str, Recipe]:
    """The name of the recipe of SMALL for these images, and the recipe with their size, channels and labels.

    "small-32" serves images whose shorter sides have a median of at most 40 pixels, "small-64" all others.
    Images of one size that the network can halve, with sides of at most 40 or 64 pixels, keep their size.
    All others become squares of 32 or 64 pixels, or less where the images are smaller. Grey images are not
    mirrored, because they are often letters or digits.
    """
    name = next(name for name, side in SMALL.items() if found.side <= side or name == "small-64")
    recipe = load_recipe(name)
    config = UNetConfig.from_dict(recipe.unet)
    multiple = config.patch_size * 2 ** (len(config.channel_mult) - 1)
    size = found.size
    if size is None or max(size) > SMALL[name] or any(side % multiple for side in size):
        square = min(config.image_shape[0], found.side // multiple * multiple)
        size = (max(multiple, square),) * 2
    unet = recipe.unet | {"sample_size": size[0] if size[0] == size[1] else size}
    if not found.labelled:
        unet = unet | {"num_classes": None}
    elif found.classes is not None:
        unet = unet | {"num_classes": found.classes}
    recipe, _ = with_channels(replace(recipe, unet=unet), found.channels, {}, name)
    return name, mirroring_colour(recipe, name, found.channels)


def mirroring_colour(recipe: Recipe, name: str | None, channels: int) -> Recipe:
    """The recipe of this name; one of SMALL mirrors images of three channels only."""
    return replace(recipe, horizontal_flip=channels == 3) if name in SMALL else recipe


def with_channels(recipe: Recipe, own: int, fixed: dict[str, str], data: str) -> tuple[Recipe, str]:
    """The recipe for images with `own` channels, and a remark on the change for the user.

    fixed: the fields of the network that the user wrote, each with the option or file that holds it. data: a
    name of NAMED_SETS, or of another set. ValueError if colour would be lost, unless "--set" asks for it.
    """
    config = UNetConfig.from_dict(recipe.unet)
    wanted, where = config.in_channels, fixed.get("in_channels") or fixed.get("out_channels")
    if wanted == own:
        return recipe, ""
    if where is None:
        outputs = own * config.out_channels // wanted
        unet = recipe.unet | {"in_channels": own, "out_channels": outputs}
        return replace(recipe, unet=unet), f" (the recipe had {wanted})"
    if data in NAMED_SETS:  # these are never converted
        raise ValueError(f"{data} has {counted(own, 'channel')}, but unet.in_channels is {wanted} in {where}")
    if own > wanted and where != "--set":
        outputs = own * config.out_channels // wanted
        wider = f"keep it by --set unet.in_channels={own} unet.out_channels={outputs}"
        way = "start from another model" if where.startswith("--init") else wider
        raise ValueError(
            f"{data} holds colour, which {where} would lose: unet.in_channels is {wanted}; {way}, or drop it "
            f"by --set unet.in_channels={wanted}"
        )
    return (
        recipe,
        f" (colour is dropped, as {where} asks)" if own > wanted else f" (grey, repeated for {where})",
    )


class Labelled(Protocol):
    """A set of images with a name, and perhaps with labels and names of its classes."""

    @property
    def labels(self) -> torch.Tensor | None: ...
    @property
    def classes(self) -> tuple[str, ...] | None: ...
    @property
    def name(self) -> str: ...


LabelledSet = TypeVar("LabelledSet", ImageSet, LoadedSet)


def with_classes(recipe: Recipe, data: Labelled, fixed: dict[str, str]) -> Recipe:
    """The conditional recipe with as many classes as the data have; ValueError if the user wrote others.

    fixed: as that of `with_channels`.
    """
    if data.labels is None:
        raise ValueError(
            f"a class-conditional model needs labels, which {data.name} does not have: give one folder a "
            "class, or a dataset.json, or add --unconditional"
        )
    count = len(data.classes) if data.classes else int(data.labels.max()) + 1
    check_classes(recipe, count, data.classes, fixed, data.name)
    return replace(recipe, unet=recipe.unet | {"num_classes": count})


def check_classes(
    recipe: Recipe, count: int, classes: tuple[str, ...] | None, fixed: dict[str, str], data: str
) -> None:
    """ValueError if the user wrote another number of classes than the `count` of the data of this name.

    classes: their names, or None. fixed: as that of `with_channels`.
    """
    wanted = recipe.unet.get("num_classes")
    if count != wanted and wanted is not None and "num_classes" in fixed:
        names = f" ({listed(classes)})" if classes else ""
        raise ValueError(
            f"{data} has {counted(count, 'class')}{names}, but unet.num_classes is {wanted} in "
            f"{fixed['num_classes']}; the labels of the images must be those of the model: --set "
            f"unet.num_classes={count}"
        )


def labels_by_name(data: Labelled, classes: tuple[str, ...] | None, owner: str) -> torch.Tensor | None:
    """The labels of the data in another order of classes: `classes`, which are those of `owner`.

    ValueError for a class that `owner` lacks.
    """
    if data.labels is None or data.classes is None or classes is None or data.classes == classes:
        return data.labels
    unknown = [name for name in data.classes if name not in classes]
    if unknown:
        raise ValueError(f"{data.name} has a class {unknown[0]}, which {owner} lacks")
    return torch.tensor([classes.index(name) for name in data.classes], device="cpu")[data.labels]


def as_in_run(data: LabelledSet, state: dict[str, Any], owner: str) -> LabelledSet:
    """The data with the class names and labels of the run of a state, where it has names.

    owner: the run, for the message about a class that it lacks.
    """
    names, count = state["class_names"], state["recipe"].unet.get("num_classes")
    if names is None:
        return data if len(data.classes or ()) == count else data._replace(classes=None)
    return data._replace(classes=names, labels=labels_by_name(data, names, owner))


def about_classes(
    classes: Sequence[str] | None, labels: torch.Tensor | None, count: int, remark: str = ""
) -> str:
    """Number and names of the classes, and those without an image among the labels that are trained on."""
    seen = set() if labels is None else set(labels.tolist())
    missing = [label for label in range(count) if label not in seen] if len(seen) < count else []
    names = f": {listed(tuple(classes))}" if classes else ""
    without = f"; no images of {listed([classes[k] if classes else str(k) for k in missing])}"
    return f"{counted(count, 'class')}{remark}{names}{without if missing else ''}"


def check_apart(data: str | os.PathLike, out: str | os.PathLike, name: str = "data") -> None:
    """ValueError if the folder of a run lies in the folder of images, whose images its grids would become."""
    folder, run = Path(os.path.realpath(data)), Path(os.path.realpath(out))
    if not folder.is_dir() or not run.is_relative_to(folder):
        return
    if not is_hidden(run.relative_to(folder).as_posix()):
        raise ValueError(
            f"the run's folder {os.fspath(out)} lies in the {name} {os.fspath(data)}, whose images its "
            "sample grids would become; choose another folder by --out"
        )


def most_held_out(count: int, labels: torch.Tensor | None) -> int:
    """The most of `count` images that can be held out: each class keeps an image to train on."""
    return count - (1 if labels is None else len(labels.unique()))


def held_out_by_default(count: int, labels: torch.Tensor | None) -> int:
    """The number of `count` images with these labels that are held out where nothing says how many."""
    return min(MAX_HELD_OUT, count // HELD_OUT_SHARE, most_held_out(count, labels))


def split(
    count: int, held_out: int, seed: int, labels: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices int64 of the images to train on and of those held out, drawn by the seed; both in order.

    labels: int64 [count] or None; the image of each class that is drawn last is not held out.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, "held out", 0))
    order = torch.randperm(count, generator=generator, device="cpu").tolist()
    classes = [0] * count if labels is None else labels.tolist()
    last = {classes[index]: index for index in order}
    drawn = [index for index in order if last[classes[index]] != index][:held_out]
    chosen = torch.zeros(count, dtype=torch.bool, device="cpu")
    chosen[drawn] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()


def listed(names: tuple[str, ...] | list[str]) -> str:
    """Up to MAX_NAMED names in one line."""
    shown = [one_line_name(name) for name in names[:MAX_NAMED]]
    return ", ".join([*shown, "..."] if len(names) > MAX_NAMED else shown)


def one_line_name(name: str) -> str:
    """A file name in one line, with bytes that are not UTF-8 escaped."""
    return " ".join(name.encode("utf-8", "backslashreplace").decode().split())
