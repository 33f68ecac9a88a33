"""The training data of `diffusion train`, and the recipe with the classes and channels of that data."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ..data import NAMED_SETS, ImageSet, load_dataset
from ..data.image_folder import survey
from ..data.image_set import SomeImages, Survey
from ..models.config import UNetConfig
from ..training.fitting import (
    SMALL,
    about_classes,
    as_in_run,
    check_classes,
    held_out_by_default,
    labels_by_name,
    most_held_out,
    one_line_name,
    small_recipe,
    split,
    with_channels,
    with_classes,
)
from ..training.loop import STATE
from ..training.recipe import RECIPES, Recipe, load_recipe
from ..training.state import read_state
from ..utils.validation import whole_number
from ..utils.words import counted

VALIDATION_IMAGES = 1000


class TrainingData(NamedTuple):
    """recipe: fitted to the data. images, labels: to train on. classes: their names, or None.

    validation: images and labels that are not trained on. found: one line that describes the data.
    """

    recipe: Recipe
    images: torch.Tensor | SomeImages
    labels: torch.Tensor | None
    classes: tuple[str, ...] | None
    validation: tuple[torch.Tensor, torch.Tensor | None] | None
    found: str


def surveyed(args: argparse.Namespace) -> Survey:
    """The survey of the folder or zip that the options name, kept with the options: it reads many files."""
    if getattr(args, "survey", None) is None:
        args.survey = survey(args.data)
    return args.survey


def recipe_for_data(args: argparse.Namespace) -> Recipe:
    """The recipe of `fitting.SMALL` for the images that the options name, which becomes `args.recipe`."""
    if args.data in NAMED_SETS:
        channels, *size = NAMED_SETS[args.data].shape
        found = Survey.of(0, channels, [(size[0], size[1])], labelled=True)
    else:
        found = surveyed(args)
    if args.resize:  # which makes squares
        found = found._replace(size=None)
    args.recipe, recipe = small_recipe(found)
    return recipe


def channels_of(args: argparse.Namespace) -> int:
    """The channels of the images that the options name, which the survey tells."""
    return NAMED_SETS[args.data].shape[0] if args.data in NAMED_SETS else surveyed(args).channels


def fitted_to_survey(args: argparse.Namespace, recipe: Recipe) -> Recipe:
    """The recipe with the channels and classes that `load_data` would take, without the images decoded."""
    if args.resume or args.data is None or args.data in NAMED_SETS:
        return recipe
    found, fixed = surveyed(args), _fixed_fields(args, recipe)
    recipe, _ = with_channels(recipe, found.channels, fixed, args.data)
    if None in (recipe.unet.get("num_classes"), found.classes) or "num_classes" in fixed:
        return recipe
    return replace(recipe, unet=recipe.unet | {"num_classes": found.classes})


def load_data(args: argparse.Namespace, recipe: Recipe, progress: bool = False) -> TrainingData:
    """The images that the options name, and the recipe with the channels and classes of these images.

    A recipe of the package takes both from the data. A field of the network that the user wrote, by --set or
    in a recipe's file, is kept: ValueError if the data have another number of classes, or if colour would be
    lost, unless --set asks for one channel. A resumed run keeps its own. An unconditional recipe stays
    unconditional. The image size is never taken from the data: if it differs, a ValueError names the option
    to use. progress: show a bar while images are decoded.
    """
    named = {"data_dir": args.data_dir, "download": args.download} if args.data in NAMED_SETS else {}
    for name in ("cache", "resize") if named else ("data_dir", "download"):
        if getattr(args, name):
            kind = "a folder or zip of images" if named else f"the data sets {', '.join(NAMED_SETS)}"
            raise ValueError(f"--{name.replace('_', '-')} is for {kind}, and --data is {args.data}")
    if args.validation_data:
        survey(args.validation_data)  # a wrong path fails before images are decoded
    fixed, wanted = _fixed_fields(args, recipe), UNetConfig.from_dict(recipe.unet)
    data = load_dataset(args.data, split="train", **named) if named else None
    if args.resume:
        recipe, about_channels = _of_the_run(args, recipe, fixed), ""
    else:
        own = surveyed(args).channels if data is None else data.images.shape[1]
        recipe, about_channels = with_channels(recipe, own, fixed, args.data)
        if data is None and (count := surveyed(args).classes):  # told before images are decoded
            check_classes(recipe, count, surveyed(args).class_names, fixed, args.data)
    config = UNetConfig.from_dict(recipe.unet)
    options = {"channels": config.in_channels, "cache": args.cache, "progress": progress}
    if args.resize:
        height, width = config.image_shape
        if height != width:
            raise ValueError(f"--resize makes square images, and the model's are {height} x {width}")
        options["size"] = height
    if data is None:
        data = load_dataset(args.data, **options)
    _check_size(data, config, bool(named))
    if args.resume:
        data = as_in_run(data, read_state(Path(args.out) / STATE), f"the run in {args.out}")
    validation = None
    if args.validation_data:
        validation = load_dataset(args.validation_data, **options)
        labels = labels_by_name(validation, data.classes, data.name)
        validation = validation._replace(labels=labels)
    elif named:
        validation = load_dataset(args.data, split="test", **named)
    found_classes = "labels are not used" if data.labels is not None else "no labels"
    if config.num_classes is None:
        data = data._replace(labels=None, classes=None)
    else:
        if not args.resume:
            recipe = with_classes(recipe, data, fixed)
    if args.hold_out is None:
        few = held_out_by_default(len(data.images), data.labels)
        args.hold_out = 0 if validation is not None or args.resume else few
    whole_number("--hold-out", args.hold_out, 0, most_held_out(len(data.images), data.labels))
    if args.hold_out and validation is not None:
        raise ValueError("--hold-out is for data without other validation images: leave it out")
    images: torch.Tensor | SomeImages = data.images
    labels, about_held_out = data.labels, ""
    if args.hold_out_seed is None:
        owner = read_state(Path(args.out) / STATE)["recipe"] if args.resume else recipe
        args.hold_out_seed = owner.seed
    if args.hold_out:
        kept, held_out = split(len(data.images), args.hold_out, args.hold_out_seed, labels)
        validation = ImageSet(data.images[held_out], None if labels is None else labels[held_out], None, "")
        images, labels = SomeImages(data.images, kept), None if labels is None else labels[kept]
        about_held_out = f" ({args.hold_out:,} held out)"
    count = recipe.unet.get("num_classes")
    if count is not None:
        fitting = count == wanted.num_classes or args.recipe in SMALL
        had = "" if fitting else f" (the recipe had {wanted.num_classes})"
        found_classes = about_classes(data.classes, labels, count, had)
    recipe, about_batch = _with_batch(args, recipe, len(images))
    height, width = config.image_shape
    scaled = " (the middle square, scaled)" if args.resize else ""
    channels = f"{counted(config.in_channels, 'channel')}{about_channels}"
    found = f"{counted(len(data.images), 'image')}{about_held_out}, {width} x {height}{scaled}, {channels}"
    found = f"{one_line_name(data.name)}: {found}, {found_classes}{about_batch}"
    return TrainingData(recipe, images, labels, data.classes, _some(validation, config), found)


def _with_batch(args: argparse.Namespace, recipe: Recipe, count: int) -> tuple[Recipe, str]:
    """The recipe, if it is one of SMALL, with batches that so many images fill; and a remark for the user."""
    if count >= recipe.batch_size or args.recipe not in SMALL or args.batch_size is not None or args.resume:
        return recipe, ""
    return replace(recipe, batch_size=count), f", batches of {count} (the recipe had {recipe.batch_size})"


def _fixed_fields(args: argparse.Namespace, recipe: Recipe) -> dict[str, str]:
    """The fields of the network that the user wrote, each with the option or file that holds it."""
    fixed: dict[str, str] = {}
    if args.recipe is not None and args.recipe not in RECIPES:
        fixed |= dict.fromkeys(load_recipe(args.recipe).unet, args.recipe)
    if args.init is not None:
        fixed |= dict.fromkeys(("in_channels", "out_channels"), f"--init {args.init}")
    for change in args.set or ():
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


def _some(validation: ImageSet | None, config: UNetConfig) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Up to VALIDATION_IMAGES images, evenly spaced, because files are often sorted by class."""
    if validation is None:
        return None
    count = min(VALIDATION_IMAGES, len(validation.images))
    chosen = torch.arange(count, device="cpu") * len(validation.images) // count
    labels = validation.labels if config.num_classes is not None else None
    return validation.images[chosen], None if labels is None else labels[chosen]
