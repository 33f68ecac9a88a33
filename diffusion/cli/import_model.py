"""Convert a checkpoint of diffusers, guided-diffusion or improved-diffusion into a model folder."""

import argparse
import ast

from .. import importers
from ..ddpm import DDPM

OPTIONS = ("schedule", "size", "null_label")  # flags that have an option of their own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("source", help="a diffusers folder, hf:owner/name, or a .pt file of guided- or improved-diffusion")
    add("--out", required=True, metavar="DIR", help="the model folder to write")
    add(
        "--flag",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for .pt files: a flag of the training command, such as learn_sigma=True; may be repeated",
    )
    add("--schedule", help="a noise schedule by name, or a scheduler_config.json, where the source has none")
    add("--size", help="height and width of the images, such as 32 or 32x48, where the source has none")
    add("--null-label", type=int, help="the label that stands for no label, where the source has one")


def run(args: argparse.Namespace) -> None:
    flags = _flags(args.flag)
    flags |= {name: value for name in OPTIONS if (value := getattr(args, name)) is not None}
    imported = importers.read(args.source, flags=flags)
    if assumed := imported.assumed_text():
        print(f"assumed flags, which --flag NAME=VALUE changes: {assumed}")
    model = DDPM(imported.unet, imported.schedule, **imported.conventions)
    model.save(args.out, source=args.source)
    parameters = model.unet.config.num_parameters
    print(
        f"{args.out}: {parameters:,} parameters, {model.prediction_type} prediction, T = {model.schedule.T}"
    )


def _flags(words: list[str]) -> dict[str, object]:
    """["a=1", "b=cosine"] to {"a": 1, "b": "cosine"}: values of Python, or else text."""
    flags = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--flag takes NAME=VALUE, not {word!r}")
        try:
            flags[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            flags[name] = value  # a bare word, such as cosine
    return flags
