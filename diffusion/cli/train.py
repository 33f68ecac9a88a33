"""Train a model. That of digits: `diffusion train --data mnist --data-dir DIR --out RUN`."""

import argparse
import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..data import NAMED_SETS
from ..ddpm import DDPM, load
from ..evaluation.features import Features, load_features
from ..evaluation.held_out import HeldOutDistance
from ..models.config import UNetConfig
from ..training.distributed import process_group
from ..training.fine_tuning import recipe_for
from ..training.fitting import SMALL, check_apart, mirroring_colour
from ..training.loop import STATE, check_free, check_steps, train
from ..training.outlook import disk_use, outlook
from ..training.recipe import RECIPES, Recipe, changed, load_recipe
from ..training.state import read_state
from ..training.tensorboard_log import summary_writer
from ..training.trainer import Trainer
from ..utils.device import check_dtype, torch_multiplies_bfloat16
from ..utils.errors import first_line
from ..utils.memory import is_out_of_memory
from ..utils.names import own_name
from ..utils.ranks import current_ranks
from ..utils.validation import number, whole_number
from ..utils.words import counted
from .options import choose_device
from .train_options import (
    AUTOCAST,
    DEFAULTS,
    INTERVALS,
    MIN_MEASURED,
    OVERRIDES,
    absolute,
    kept_options,
    recall,
)
from .train_options import add_arguments as add_arguments
from .training_data import (
    TrainingData,
    channels_of,
    fitted_to_survey,
    load_data,
    recipe_for_data,
    surveyed,
)


def run(args: argparse.Namespace) -> None:
    begun = time.monotonic()
    _check_minutes(args)
    if args.resume:
        recall(args)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data is None and args.resume and args.recipe is None:
        raise ValueError(f"--data is missing: the run in {args.out} did not keep the images that it is on")
    if args.data is None:
        args.data = args.recipe.partition("-")[0] if args.recipe in RECIPES else "mnist"
        args.data = args.data if args.data in NAMED_SETS else None
    own_name(args.data, NAMED_SETS, "data set")  # tells of a folder of this name
    init = None if args.init is None else load(args.init)
    recipe = choose_recipe(args, init)
    if args.show:
        print(fitted_to_survey(args, recipe).to_json())
        return
    intervals = {name: getattr(args, name) for name in INTERVALS}
    for name, steps in intervals.items():
        whole_number(f"--{name.replace('_', '-')}", steps, 1)
    if args.micro_batch is not None:
        whole_number("--micro-batch", args.micro_batch, 1)
    if not args.out:
        raise ValueError("--out is missing: the folder for the model, log, samples and checkpoint")
    if args.data is None:
        raise ValueError("--data is missing: a folder or zip of images")
    if args.accept_changes and not args.resume:
        raise ValueError("--accept-changes is for --resume")
    if args.data in NAMED_SETS and not args.data_dir:
        raise ValueError(f"--data-dir is missing: the folder that holds {args.data}")
    for name in ("data", "validation_data"):
        if getattr(args, name) and args.data not in NAMED_SETS:
            check_apart(getattr(args, name), args.out, f"--{name.replace('_', '-')}")
    if not args.resume:
        check_free(args.out)
    if args.tensorboard:
        summary_writer()
    ranks = current_ranks()
    device = choose_device(args.device, ranks)
    autocast = choose_autocast(args.autocast, device)
    features = None if args.features in (None, "none") else load_features(args.features)
    data = load_data(args, recipe, progress=ranks.rank == 0)
    measure = choose_measure(args, data, features)
    recipe = data.recipe
    with process_group(ranks, device), _suggest_options(device):
        trainer = Trainer(
            recipe,
            data.images,
            data.labels,
            data.validation,
            device,
            autocast=autocast,
            micro_batch=args.micro_batch,
            channels_last=args.channels_last,
            activation_checkpointing=bool(args.checkpointing),
            compile=bool(args.compile),
            ranks=ranks,
            init=None if args.resume else init,
            class_names=data.classes,
            command=kept_options(args),
        )
        start = read_state(Path(args.out) / STATE)["step"] if args.resume else 0
        check_steps(trainer, args.out, start)
        use = disk_use(trainer, args.out, start)
        if ranks.rank == 0:
            print(f"{data.found}; {outlook(trainer, args.recipe, start)}", flush=True)
            print(use, flush=True)
        train(
            trainer,
            args.out,
            resume=args.resume,
            accept_changes=args.accept_changes,
            measure=measure,
            tensorboard=bool(args.tensorboard),
            minutes=_minutes_left(args.minutes, begun),
            save_minutes=args.save_minutes,
            fit_steps=args.fit_steps,
            **intervals,
        )
    if ranks.rank == 0:
        shared = f", {ranks.world_size} ranks" if ranks.world_size > 1 else ""
        minutes = trainer.seconds / 60
        rate = trainer.step * trainer.recipe.batch_size / max(trainer.seconds, 1e-9)
        print(
            f"{args.out}: {_steps_taken(trainer)} in {minutes:.1f} minutes on {device}{shared}, "
            f"{rate:.1f} images/s, {rate / ranks.world_size:.1f} per rank"
        )


def _check_minutes(args: argparse.Namespace) -> None:
    """ValueError: options about the time of a run that make no sense."""
    if args.fit_steps and args.minutes is None:
        raise ValueError("--fit-steps needs --minutes, which the steps are fitted to")
    if args.fit_steps and current_ranks().world_size > 1:
        raise ValueError("--fit-steps is for a single process")
    for name in ("minutes", "save_minutes"):
        if getattr(args, name) is not None:
            number(f"--{name.replace('_', '-')}", getattr(args, name), above=0)


def _minutes_left(minutes: float | None, begun: float) -> float | None:
    """Of the minutes since `begun`, of time.monotonic."""
    return None if minutes is None else max(1e-3, minutes - (time.monotonic() - begun) / 60)


def _steps_taken(trainer: Trainer) -> str:
    steps = trainer.recipe.steps
    return (
        counted(steps, "step")
        if trainer.step == steps
        else f"{trainer.step} of {counted(steps, 'step')}, saved for --resume,"
    )


@contextlib.contextmanager
def _suggest_options(device: torch.device) -> Iterator[None]:
    """Turns out-of-memory and torch.compile failures into a ValueError that suggests an option."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            ways = "--micro-batch, --checkpointing, or a smaller network"
            raise ValueError(f"the memory of {device} is not enough; try {ways}") from error
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise ValueError(
                f"torch.compile fails here; train without --compile: {first_line(error)}"
            ) from error
        raise


def choose_recipe(args: argparse.Namespace, init: DDPM | None = None) -> Recipe:
    """The recipe with the changes of the options. init: the model of --init.

    A resumed run keeps its recipe, unless another than those for images of any size is named. Without a name
    the data choose the recipe, and then `args.recipe` and `args.resize` say how.
    """
    chosen = False
    if args.resume and args.recipe in (None, *SMALL):
        recipe = read_state(Path(args.out) / STATE)["recipe"]
    else:
        if args.recipe is None and args.data in NAMED_SETS and args.data in RECIPES:
            args.recipe = args.data
        chosen = args.recipe is None
        recipe = recipe_for_data(args) if chosen else load_recipe(args.recipe)
        if args.recipe in SMALL and args.data is not None:  # these mirror colour images only
            recipe = mirroring_colour(recipe, args.recipe, channels_of(args))
        args.recipe_name, args.init_name = args.recipe, absolute(args.init)
        if init is not None:
            recipe = recipe_for(init, recipe)
    recipe = changed(recipe, args.set or [])
    if recipe.learning_rate_decay == "constant" and any(
        change.startswith("decay_fraction=") for change in args.set or []
    ):
        raise ValueError(
            "--set decay_fraction does nothing to a constant learning rate: add learning_rate_decay=linear"
        )
    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    recipe = replace(recipe, **given)
    if args.unconditional:
        recipe = replace(recipe, unet=recipe.unet | {"num_classes": None})
    if chosen and args.data not in NAMED_SETS and args.resize is None:
        args.resize = surveyed(args).size != UNetConfig.from_dict(recipe.unet).image_shape
    return recipe


def choose_measure(
    args: argparse.Namespace, data: TrainingData, features: Features | None
) -> HeldOutDistance | None:
    """The distance to the held-out images in the features of the options, or None for none.

    features: those that --features names. Without the option, it is measured in EfficientNet-Lite0's, for a
    recipe of any size, where these are installed and enough images are held out; `args.features` then says
    which it is.
    """
    if args.features is None:
        few = data.validation is None or len(data.validation[0]) < MIN_MEASURED
        if args.resume or args.recipe not in SMALL or few:
            args.features = "none"
    if args.features == "none":
        return None
    if data.validation is None:
        raise ValueError("--features needs held-out images: add --hold-out N or --validation-data")
    if features is None:
        args.features = "efficientnet-lite0"
        try:
            features = load_features(args.features)
        except ValueError:
            args.features = "none"  # it is not installed
            return None
    return HeldOutDistance(*data.validation, features)


def choose_autocast(choice: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32. ValueError if the device lacks the chosen one."""
    if choice != "auto":
        dtype = AUTOCAST[choice]
        if dtype is not None:
            check_dtype(device, dtype)
        return dtype
    return torch.bfloat16 if torch_multiplies_bfloat16(device) else None
