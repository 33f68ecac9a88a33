"""Train a model; `diffusion train --data mnist --data-dir DIR --out RUN` is the bundled model's recipe."""

import argparse
import contextlib
from collections.abc import Iterator
from dataclasses import fields, replace

import torch

from ..data import DATASETS
from ..ddpm import DDPM, load
from ..kernels._native import allows
from ..training.distributed import process_group
from ..training.fine_tuning import recipe_for
from ..training.loop import train
from ..training.recipe import RECIPES, Recipe, changed, load_recipe
from ..training.trainer import Trainer
from ..utils.device import check_dtype
from ..utils.memory import is_out_of_memory
from ..utils.ranks import current
from ..utils.validation import whole_number
from .sample import choose_device
from .training_data import load_data

OVERRIDES = ("steps", "batch_size", "learning_rate", "warmup_steps", "ema_decay", "label_dropout", "seed")
AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16, "off": None}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--data",
        help=f"{', '.join(DATASETS)}, or a folder or zip of images, class/name.png (default: what the recipe "
        "is named after, or mnist)",
    )
    add("--data-dir", help="torchvision's folder of mnist or cifar10, such as DIR with DIR/MNIST/raw")
    add("--download", action="store_true", help="let torchvision fetch missing files")
    add(
        "--validation-data",
        metavar="PATH",
        help="another folder or zip, for the validation loss (default: the test split of mnist or cifar10)",
    )
    add("--cache", metavar="DIR", help="keep decoded images there, and read them from the file")
    add(
        "--resize",
        action="store_true",
        help="of each image of a folder or zip take the square in the middle, scaled to the model's size",
    )
    add(
        "--recipe",
        help=f"{', '.join(RECIPES)}, or a JSON file as --show prints it (default: that of the data set)",
    )
    add(
        "--init",
        metavar="MODEL",
        help="start from the weights of a model, a bundled name or a folder; its network, noise schedule and "
        "prediction type take the place of the recipe's",
    )
    add("--unconditional", action="store_true", help="train without labels")
    defaults = {field.name: field for field in fields(Recipe)}
    for name in OVERRIDES:
        add(f"--{name.replace('_', '-')}", type=defaults[name].type, help="instead of the recipe's")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of the recipe, such as unet.channels=64 loss_weighting=min_snr",
    )
    add("--show", action="store_true", help="print the recipe and stop")
    add("--out", metavar="RUN", help="folder for the model, log, samples and checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint in RUN, as if never stopped")
    add(
        "--accept-changes",
        action="store_true",
        help="resume with other data, steps, rates or loss than before, such as a lower --learning-rate",
    )
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add(
        "--autocast",
        choices=("auto", *AUTOCAST),
        default="auto",
        help="16 bits in forward and backward; auto: bfloat16 where the device multiplies it in hardware",
    )
    add("--micro-batch", type=int, metavar="N", help="images at a time, for less memory (default: the batch)")
    add("--checkpointing", action="store_true", help="compute activations twice, for less memory")
    add("--compile", action="store_true", help="compile the network by torch.compile")
    add(
        "--channels-last",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="memory format of the network (default: yes)",
    )
    add("--save-every", type=int, default=500, metavar="STEPS", help="between checkpoints (default: 500)")
    add("--sample-every", type=int, default=2500, metavar="STEPS", help="between grids (default: 2500)")
    add("--validate-every", type=int, default=500, metavar="STEPS", help="(default: 500)")
    add("--log-every", type=int, default=50, metavar="STEPS", help="(default: 50)")


def run(args: argparse.Namespace) -> None:
    if args.data is None:
        args.data = args.recipe.partition("-")[0] if args.recipe in RECIPES else "mnist"
    init = None if args.init is None else load(args.init)
    recipe = choose_recipe(args, init)
    if args.show:
        print(recipe.to_json())
        return
    for name in ("save_every", "sample_every", "validate_every", "log_every"):
        whole_number(f"--{name.replace('_', '-')}", getattr(args, name), 1)
    if not args.out:
        raise ValueError("--out is missing: the folder for the model, log, samples and checkpoint")
    if args.accept_changes and not args.resume:
        raise ValueError("--accept-changes is for --resume")
    if args.data in DATASETS and not args.data_dir:
        raise ValueError(f"--data-dir is missing: the folder that holds {args.data}")
    ranks = current()
    device = choose_device(args.device, ranks)
    autocast = choose_autocast(args.autocast, device)
    recipe, data, validation, found = load_data(args, recipe)
    if ranks.rank == 0:
        print(found, flush=True)
    with process_group(ranks, device), _what_to_do(device):
        trainer = Trainer(
            recipe,
            data.images,
            data.labels,
            validation,
            device,
            autocast=autocast,
            micro_batch=args.micro_batch,
            channels_last=args.channels_last,
            checkpointing=args.checkpointing,
            compile=args.compile,
            ranks=ranks,
            init=None if args.resume else init,
        )
        start = trainer.step
        train(
            trainer,
            args.out,
            resume=args.resume,
            accept_changes=args.accept_changes,
            save_every=args.save_every,
            sample_every=args.sample_every,
            validate_every=args.validate_every,
            log_every=args.log_every,
        )
    if ranks.rank == 0:
        shared = f", {ranks.world_size} ranks" if ranks.world_size > 1 else ""
        minutes = trainer.seconds / 60
        rate = (trainer.step - start) * recipe.batch_size / max(trainer.seconds, 1e-9)
        print(
            f"{args.out}: {recipe.steps} steps in {minutes:.1f} minutes on {device}{shared}, "
            f"{rate:.1f} images/s, {rate / ranks.world_size:.1f} a rank"
        )


@contextlib.contextmanager
def _what_to_do(device: torch.device) -> Iterator[None]:
    """ValueError with a way out where memory is not enough, or torch.compile fails (without g++, it does)."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            ways = "--micro-batch, --checkpointing, or a smaller network"
            raise ValueError(f"the memory of {device} is not enough; try {ways}") from error
        if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            reason = str(error).splitlines()[0]
            raise ValueError(f"torch.compile fails here; train without --compile: {reason}") from error
        raise


def choose_recipe(args: argparse.Namespace, init: DDPM | None = None) -> Recipe:
    """The recipe that the options ask for; init: the model of --init."""
    name = args.recipe or (args.data if args.data in DATASETS else None)
    if name is None:
        raise ValueError(
            f"--recipe is missing: how to train on {args.data}; one of {', '.join(RECIPES)}, or a file"
        )
    recipe = load_recipe(name)
    if init is not None:
        recipe = recipe_for(init, recipe)
    recipe = changed(recipe, args.set)
    given = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    recipe = replace(recipe, **given)
    if args.unconditional:
        recipe = replace(recipe, unet=recipe.unet | {"num_classes": None})
    return recipe


def choose_autocast(choice: str, device: torch.device) -> torch.dtype | None:
    """What to run in instead of float32, if anything. ValueError if it is asked for and the device cannot."""
    if choice != "auto":
        if AUTOCAST[choice] is not None:
            check_dtype(device, AUTOCAST[choice])
        return AUTOCAST[choice]
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # PyTorch's own products of bfloat16, which do not need this package's library
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        faster = device.type == "cpu" and any(
            capabilities.get(name) and allows(variant)
            for name, variant in (("avx512_bf16", "avx512_bf16"), ("amx_bf16", "amx"))
        )
    return torch.bfloat16 if faster else None
