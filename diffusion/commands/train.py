"""Train a model; `diffusion train --data mnist --data-dir DIR --out RUN` is the bundled model's recipe."""

import argparse
from dataclasses import fields, replace

import torch

from ..data import DATASETS, load_mnist
from ..devices import check_dtype, resolve_device
from ..recipe import RECIPES, Recipe
from ..train import train
from ..trainer import Trainer
from .sample import default_device

OVERRIDES = ("steps", "batch_size", "learning_rate", "warmup_steps", "ema_decay", "label_dropout", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", default="mnist", help=f"data set: {', '.join(DATASETS)} (default: %(default)s)")
    add("--data-dir", required=True, help="torchvision's folder of it; MNIST's files are in DIR/MNIST/raw")
    add("--download", action="store_true", help="let torchvision fetch missing files")
    add("--out", required=True, metavar="RUN", help="folder for the model, log, samples and checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint in RUN, as if never stopped")
    add("--unconditional", action="store_true", help="train without labels")
    defaults = {field.name: field for field in fields(Recipe)}
    for name in OVERRIDES:
        add(f"--{name.replace('_', '-')}", type=defaults[name].type, help="instead of the recipe's")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add(
        "--autocast",
        choices=("auto", "bfloat16", "off"),
        default="auto",
        help="bfloat16 in forward and backward; auto: where the device multiplies it in hardware",
    )
    add("--save-every", type=int, default=500, metavar="STEPS", help="between checkpoints (default: 500)")
    add("--sample-every", type=int, default=2500, metavar="STEPS", help="between grids (default: 2500)")
    add("--validate-every", type=int, default=500, metavar="STEPS", help="(default: 500)")


def run(args: argparse.Namespace) -> None:
    if args.data not in DATASETS:
        raise ValueError(f"unknown data set {args.data!r}; choose from: {', '.join(DATASETS)}")
    for name in ("save_every", "sample_every", "validate_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    recipe = RECIPES[args.data]
    recipe = replace(
        recipe, **{name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    )
    if args.unconditional:
        recipe = replace(recipe, unet=recipe.unet | {"num_classes": None})
    device = resolve_device(args.device or default_device())
    images, labels = load_mnist(args.data_dir, "train", args.download)
    validation = [part[:1000] for part in load_mnist(args.data_dir, "test", args.download)]
    if args.unconditional:
        labels = validation[1] = None
    trainer = Trainer(recipe, images, labels, validation, device, choose_autocast(args.autocast, device))
    train(
        trainer,
        args.out,
        resume=args.resume,
        save_every=args.save_every,
        sample_every=args.sample_every,
        validate_every=args.validate_every,
    )
    print(f"{args.out}: {recipe.steps} steps in {trainer.seconds / 60:.1f} minutes on {device}")


def choose_autocast(choice: str, device: torch.device) -> bool:
    """Whether to run in bfloat16. ValueError if it is asked for and the device cannot."""
    if choice == "bfloat16":
        check_dtype(device, torch.bfloat16)
    if choice != "auto":
        return choice == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
