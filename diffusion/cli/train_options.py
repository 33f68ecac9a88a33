"""The options of `diffusion train`, and those of them that a run keeps for --resume."""

import argparse
import inspect
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..data import NAMED_SETS
from ..training.fitting import HELD_OUT_SHARE, MAX_HELD_OUT, SMALL
from ..training.loop import STATE, train
from ..training.recipe import RECIPES, Recipe
from ..training.state import read_state
from ..utils.validation import choice, typed

OVERRIDES = ("steps", "batch_size", "learning_rate", "warmup_steps", "ema_decay", "label_dropout", "seed")
# The arguments of `train` that are options, with their defaults there, and what happens at each interval.
INTERVALS = {
    "save_every": "checkpoints",
    "sample_every": "sample grids",
    "measure_every": "distances of samples to the held-out images",
    "validate_every": "validations",
    "log_every": "rows of log.csv",
}
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16, "off": None}
# The options that are neither None nor a list where they are not given.
DEFAULTS: dict[str, Any] = {"autocast": "auto", "channels_last": True}
DEFAULTS |= {name: inspect.signature(train).parameters[name].default for name in INTERVALS}
# The options that a run keeps in its state, with their types; --resume goes on with those that are not given
# again.
PATHS = ("data", "data_dir", "validation_data", "cache")
KEPT: dict[str, Any] = {
    **dict.fromkeys(PATHS, str),
    **dict.fromkeys(INTERVALS, int),
    **dict.fromkeys(("channels_last", "resize", "checkpointing", "compile", "tensorboard"), bool),
    **dict.fromkeys(("hold_out", "micro_batch"), int),
    "save_minutes": float,
    "autocast": str,
    "features": str,
    # No options, but kept with them.
    "hold_out_seed": int,
    "recipe_name": str | None,
    "init_name": str | None,
}
MIN_MEASURED = 50  # images held out, of which a distance is measured by default


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        help=f"{', '.join(NAMED_SETS)}, or a folder or zip of images named class/name.png (default: the "
        "recipe's data set, or mnist)",
    )
    add(
        "--data-dir",
        help=f"torchvision's folder of {' or '.join(NAMED_SETS)}: DIR, if the files are in DIR/MNIST/raw",
    )
    add("--download", action="store_true", help="let torchvision fetch missing files")
    add(
        "--validation-data",
        metavar="PATH",
        help=f"folder or zip for the held-out loss (default: the test split of {' or '.join(NAMED_SETS)})",
    )
    add(
        "--hold-out",
        type=int,
        metavar="N",
        help="number of images of a folder or zip to keep for the held-out loss instead of training on them "
        f"(default: one of {HELD_OUT_SHARE}, at most {MAX_HELD_OUT}; 0 with --validation-data)",
    )
    add("--cache", metavar="DIR", help="folder for a file of decoded images, read instead of decoding again")
    add(
        "--resize",
        action=argparse.BooleanOptionalAction,
        help="crop each image of a folder or zip to a central square, scaled to the model's size (default "
        "without --recipe, where the images differ from the model's size)",
    )
    add(
        "--recipe",
        help=f"{', '.join(RECIPES)}, or a JSON file as --show prints it (default: the data set's, or "
        f"{' or '.join(SMALL)} by the size of the images)",
    )
    add(
        "--init",
        metavar="MODEL",
        help="start from the weights of a model (bundled name or folder); its network, noise schedule and "
        "prediction type replace the recipe's",
    )
    add("--unconditional", action="store_true", help="train without labels")
    defaults = {field.name: field for field in fields(Recipe)}
    for name in OVERRIDES:
        add(f"--{name.replace('_', '-')}", type=defaults[name].type, help=f"override the recipe's {name}")
    add(
        "--set",
        nargs="+",
        action="extend",
        metavar="FIELD=VALUE",
        help="other fields of the recipe, such as unet.channels=64 loss_weighting=min_snr",
    )
    add("--show", action="store_true", help="print the recipe and stop")
    add("--out", metavar="RUN", help="folder for the model, log, samples and checkpoint")
    add(
        "--resume",
        action="store_true",
        help="continue from the checkpoint in RUN; options that are not given are those of the run, except "
        "for --device",
    )
    add(
        "--accept-changes",
        action="store_true",
        help="with --resume: allow other data, steps, rates or loss, such as a lower --learning-rate",
    )
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add(
        "--autocast",
        choices=("auto", *AUTOCAST),
        help="dtype of forward and backward; auto: bfloat16 where the device multiplies it in hardware",
    )
    add(
        "--micro-batch",
        type=int,
        metavar="N",
        help="number of images at a time, for less memory (default: all)",
    )
    add(
        "--checkpointing",
        action=argparse.BooleanOptionalAction,
        help="recompute activations in the backward pass, for less memory",
    )
    add(
        "--features",
        metavar="NAME",
        help="measure the distance of samples to the held-out images in these features: inception, "
        "efficientnet-lite0, classifier (of digits), the folder of a classifier, or none (default: "
        f"efficientnet-lite0, where it is installed and {MIN_MEASURED} images of a folder are held out)",
    )
    add(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        help="also write the log and the grids for TensorBoard, into RUN/tensorboard",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile the network with torch.compile",
    )
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        help="use the memory format channels_last (default: yes)",
    )
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="end the run, saved, within M minutes of the command's start; --resume goes on",
    )
    add(
        "--fit-steps",
        action="store_true",
        help="with --minutes: take as many steps as fit, whatever the recipe says, so that the learning rate "
        "falls in time",
    )
    add(
        "--save-minutes",
        type=float,
        metavar="M",
        help="also save a checkpoint when the last one is M minutes old",
    )
    for name, things in INTERVALS.items():
        add(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="STEPS",
            help=f"steps between {things} (default: {DEFAULTS[name]})",
        )
    parser.set_defaults(**dict.fromkeys(KEPT))  # `run` fills what is not given


def recall(args: argparse.Namespace) -> None:
    """Fills the options of KEPT that are not given with those of the run that is resumed."""
    if not args.out:
        raise ValueError("--out is missing: the folder of the run to resume")
    kept = _kept(Path(args.out) / STATE)
    if args.init is not None and "recipe_name" in kept and absolute(args.init) != kept.get("init_name"):
        start = kept.get("init_name", "random weights")
        raise ValueError(f"the run in {args.out} began from {start}, not {args.init}; leave out --init")
    if args.recipe in SMALL and kept.get("recipe_name", args.recipe) != args.recipe:
        own = f"of {kept['recipe_name']}" if kept["recipe_name"] else "of another recipe"
        raise ValueError(f"the run in {args.out} is {own}, not of {args.recipe}; leave out --recipe")
    for name in KEPT:
        if getattr(args, name) is None and name in kept:
            setattr(args, name, kept[name])


def _kept(state: Path) -> dict[str, Any]:
    """The options in a state. ValueError if one of them has another type."""
    kept = read_state(state)["command"]
    try:
        for name in KEPT.keys() & kept.keys():
            typed(name, kept[name], KEPT[name])
        if "autocast" in kept:
            choice("autocast", kept["autocast"], ("auto", *AUTOCAST))
    except ValueError as error:
        raise ValueError(f"{state} is no training state, or damaged: {error}") from error
    return kept


def kept_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of KEPT that are given, which a run keeps. Paths do not depend on the working folder."""
    kept = {name: value for name in KEPT if (value := getattr(args, name)) is not None}
    for name in PATHS:
        if name in kept and kept[name] not in NAMED_SETS:
            kept[name] = os.path.abspath(kept[name])
    if "features" in kept:
        kept["features"] = absolute(kept["features"])
    return kept


def absolute(name: str | None) -> str | None:
    """A name as it is, but a folder that exists by its absolute path."""
    return os.path.abspath(name) if name and os.path.isdir(name) else name
