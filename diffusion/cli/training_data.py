"""The training data of `diffusion train`, and the recipe with the classes and channels of that data."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..data import NAMED_SETS, ImageSet, load_dataset
from ..data.image_folder import channels_of
from ..models.config import UNetConfig
from ..training.loop import STATE
from ..training.recipe import RECIPES, Recipe, load_recipe
from ..training.state import read_state

VALIDATION_IMAGES = 1000
MAX_NAMED = 10  # classes named in a message


class TrainingData(NamedTuple):
    """recipe: fitted to the data. validation: images and labels. found: one line that describes the data."""

    recipe: Recipe
    images: ImageSet
    validation: tuple[torch.Tensor, torch.Tensor | None] | None
    found: str


def load_data(args: argparse.Namespace, recipe: Recipe) -> TrainingData:
    """The images that the options name, and the recipe with the channels and classes of these images.

    A recipe of the package takes both from the data. A field of the network that the user wrote, by --set or
    in a recipe's file, is kept: ValueError if the data have another number of classes, or if colour would be
    lost, unless --set asks for one channel. A resumed run keeps its own. An unconditional recipe stays
    unconditional. The image size is never taken from the data: if it differs, a ValueError names the option
    to use.
    """
    named = {"data_dir": args.data_dir, "download": args.download} if args.data in NAMED_SETS else {}
    for name in ("cache", "resize") if named else ("data_dir", "download"):
        if getattr(args, name):
            kind = "a folder or zip of images" if named else f"the data sets {', '.join(NAMED_SETS)}"
            raise ValueError(f"--{name.replace('_', '-')} is for {kind}, and --data is {args.data}")
    fixed, wanted = _fixed_fields(args, recipe), UNetConfig.from_dict(recipe.unet)
    data = load_dataset(args.data, split="train", **named) if named else None
    if args.resume:
        recipe, about_channels = _of_the_run(args, recipe, fixed), ""
    else:
        own = channels_of(args.data) if data is None else data.images.shape[1]
        recipe, about_channels = _with_channels(recipe, own, fixed, args.data)
    config = UNetConfig.from_dict(recipe.unet)
    options = {"channels": config.in_channels, "cache": args.cache}
    if args.resize:
        height, width = config.image_shape
        if height != width:
            raise ValueError(f"--resize makes square images, and the model's are {height} x {width}")
        options["size"] = height
    if data is None:
        data = load_dataset(args.data, **options)
    _check_size(data, config, bool(named))
    validation = None
    if args.validation_data:
        validation = load_dataset(args.validation_data, **options)
        validation = validation._replace(labels=_labels_by_name(validation, data))
    elif named:
        validation = load_dataset(args.data, split="test", **named)
    about_classes = ", labels are not used" if data.labels is not None else ", no labels"
    if config.num_classes is None:
        data = data._replace(labels=None)
    else:
        if not args.resume:
            recipe = _with_classes(recipe, data, fixed)
        about_classes = _about_classes(data, recipe.unet["num_classes"], wanted.num_classes)
    height, width = config.image_shape
    scaled = " (scaled)" if args.resize else ""
    count = f"{config.in_channels} channel{'' if config.in_channels == 1 else 's'}"
    found = f"{len(data.images):,} images, {width} x {height}{scaled}, {count}{about_channels}{about_classes}"
    return TrainingData(recipe, data, _some(validation, config), f"{_printable(data.name)}: {found}")


def _fixed_fields(args: argparse.Namespace, recipe: Recipe) -> dict[str, str]:
    """The fields of the network that the user wrote, each with the option or file that holds it."""
    fixed: dict[str, str] = {}
    if args.recipe is not None and args.recipe not in RECIPES:
        fixed |= dict.fromkeys(load_recipe(args.recipe).unet, args.recipe)
    if args.init is not None:
        fixed |= dict.fromkeys(("in_channels", "out_channels"), f"--init {args.init}")
    for change in args.set:
        outer, _, name = change.partition("=")[0].partition(".")
        if outer == "unet":
            fixed |= dict.fromkeys([name] if name else recipe.unet, "--set")
    return fixed


def _of_the_run(args: argparse.Namespace, recipe: Recipe, fixed: dict[str, str]) -> Recipe:
    """The recipe with the classes and channels that the resumed run took from its data."""
    own = read_state(Path(args.out) / STATE)["recipe"].unet
    taken = {name: own[name] for name in ("in_channels", "out_channels") if name in own}
    if None not in (own.get("num_classes"), recipe.unet.get("num_classes")):
        taken["num_classes"] = own["num_classes"]
    unwritten = {name: value for name, value in taken.items() if name not in fixed}
    return replace(recipe, unet=recipe.unet | unwritten)


def _with_channels(recipe: Recipe, own: int, fixed: dict[str, str], data: str) -> tuple[Recipe, str]:
    """The recipe for images with `own` channels, and a remark on the change for the user."""
    config = UNetConfig.from_dict(recipe.unet)
    wanted, where = config.in_channels, fixed.get("in_channels") or fixed.get("out_channels")
    if wanted == own:
        return recipe, ""
    if where is None:
        outputs = own * config.out_channels // wanted
        unet = recipe.unet | {"in_channels": own, "out_channels": outputs}
        return replace(recipe, unet=unet), f" (the recipe had {wanted})"
    if data in NAMED_SETS:  # these are never converted
        raise ValueError(f"{data} has {own} channels, but unet.in_channels is {wanted} in {where}")
    if own > wanted and where != "--set":
        raise ValueError(
            f"{data} holds colour, which {where} would lose: unet.in_channels is {wanted}; keep it by --set "
            f"unet.in_channels={own} unet.out_channels={own * config.out_channels // wanted}, or drop it by "
            f"--set unet.in_channels={wanted}"
        )
    return (
        recipe,
        f" (colour is dropped, as {where} asks)" if own > wanted else f" (grey, repeated for {where})",
    )


def _with_classes(recipe: Recipe, data: ImageSet, fixed: dict[str, str]) -> Recipe:
    """The conditional recipe with as many classes as the data have; ValueError if the user wrote others."""
    if data.labels is None:
        raise ValueError(
            f"a class-conditional model needs labels, which {data.name} does not have: give one folder a "
            "class, or a dataset.json, or add --unconditional"
        )
    count, wanted = _classes(data), recipe.unet["num_classes"]
    if count != wanted and "num_classes" in fixed:
        names = f" ({_names(data.classes)})" if data.classes else ""
        raise ValueError(
            f"{data.name} has {count} classes{names}, but unet.num_classes is {wanted} in "
            f"{fixed['num_classes']}; the labels of the images must be those of the model: --set "
            f"unet.num_classes={count}"
        )
    return replace(recipe, unet=recipe.unet | {"num_classes": count})


def _classes(data: ImageSet) -> int:
    return len(data.classes) if data.classes else int(data.known_labels().max()) + 1


def _about_classes(data: ImageSet, count: int, wanted: int | None) -> str:
    """Number and names of the trained classes, and those without images."""
    had = "" if count == wanted else f" (the recipe had {wanted})"
    names = f": {_names(data.classes)}" if data.classes else ""
    seen = set() if data.labels is None else set(data.labels.tolist())
    missing = [str(label) for label in range(count) if label not in seen] if len(seen) < count else []
    without = f"; no images of {_names(missing)}" if missing else ""
    return f", {count} class{'' if count == 1 else 'es'}{had}{names}{without}"


def _names(names: list[str] | tuple[str, ...]) -> str:
    shown = [_printable(name) for name in names[:MAX_NAMED]]
    return ", ".join([*shown, "..."] if len(names) > MAX_NAMED else shown)


def _printable(name: str) -> str:
    """A file name in one line, with bytes that are not UTF-8 escaped."""
    return " ".join(name.encode("utf-8", "backslashreplace").decode().split())


def _check_size(data: ImageSet, config: UNetConfig, named: bool) -> None:
    height, width = data.images.shape[2:]
    if (height, width) != config.image_shape:
        size = height if height == width else f"[{height},{width}]"
        resize = "" if named else "--resize, which scales them, or "
        wanted = " x ".join(map(str, reversed(config.image_shape)))
        raise ValueError(
            f"{data.name} holds images of {width} x {height}, and the recipe is for {wanted}: add {resize}"
            f"--set unet.sample_size={size}"
        )


def _labels_by_name(validation: ImageSet, data: ImageSet) -> torch.Tensor | None:
    """The labels that the training data give to the classes of the validation data."""
    if validation.classes is None or data.classes is None or validation.classes == data.classes:
        return validation.labels
    unknown = [name for name in validation.classes if name not in data.classes]
    if unknown:
        raise ValueError(f"{validation.name} has a class {unknown[0]}, which {data.name} lacks")
    own = torch.tensor([data.classes.index(name) for name in validation.classes], device="cpu")
    return own[validation.labels]


def _some(validation: ImageSet | None, config: UNetConfig) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Up to VALIDATION_IMAGES images, evenly spaced, because files are often sorted by class."""
    if validation is None:
        return None
    count = min(VALIDATION_IMAGES, len(validation.images))
    chosen = torch.arange(count, device="cpu") * len(validation.images) // count
    labels = validation.labels if config.num_classes is not None else None
    return validation.images[chosen], None if labels is None else labels[chosen]
