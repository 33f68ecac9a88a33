"""Show versions, compiled libraries, the backend of each op, and bundled models."""

import argparse
import platform

import torch

from .. import __version__, kernels
from ..ddpm import load
from ..storage.checkpoint import bundled_models
from ..utils.words import counted
from .options import default_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="describe a model instead: a bundled name, a folder, or hf:owner/name"
    )


def run(args: argparse.Namespace) -> None:
    if args.model is not None:
        describe(args.model)
        return
    lines = {
        "fused-diffusion": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {counted(torch.get_num_threads(), 'thread')}",
        "device": default_device(),
        **kernels.build_info(),
        "bundled models": ", ".join(bundled_models()),
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:{width}}  {value}")
    for explanation in explanations(default_device()):
        print(explanation)


def explanations(device: str) -> list[str]:
    """For each op, the backend that a small call on this device gets, and why not the others.

    The operators that only the package calls come last, with their callers.
    """
    public = [op.op.explain(op.example(device)) for op in kernels.OPS.values()]
    return public + [op.explain() for op in kernels.INTERNAL]


def describe(name: str) -> None:
    model = load(name)
    classes = "no classes" if model.num_classes is None else counted(model.num_classes, "class")
    print(f"{name}: {model.unet.config.num_parameters:,} parameters, {classes}")
    print(
        f"{model.schedule.summary}, {model.prediction_type} prediction, {model.variance}, clip {model.clip}"
    )
    for key, value in {**model.unet.config.to_dict(), **model.metadata}.items():
        print(f"  {key}: {value}")
