"""Evaluate a model or images: class accuracy, FID and other distances, bits per dimension, or a curve.

Without further options: class accuracy with guidance and Fréchet distance without it, of the bundled digits.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..data import NAMED_SETS, ImageSet
from ..data.npz import load_images
from ..ddpm import DDPM, load
from ..evaluation.accuracy import evaluate, format_report
from ..evaluation.compare import METRICS, check_comparison, check_metrics, compare, format_result
from ..evaluation.features import load_features
from ..evaluation.guidance_sweep import check_curves, save_sweep, sweep
from ..evaluation.likelihood import bits_per_dimension
from ..evaluation.protocol import ema_decay
from ..samplers import SAMPLERS
from ..storage.atomic import check_writable, replacing
from ..storage.images import to_uint8
from ..utils.validation import whole_number
from ..utils.words import counted
from .options import (
    DEFAULT_SAMPLER,
    add_computation_options,
    choose_guidance,
    choose_labels,
    choose_sampler,
    default_device,
)

# The options that not every measure uses, with their values where they are not given.
DEFAULTS: dict[str, Any] = {
    "model": "mnist",
    "num": 1000,
    "guidance_scale": None,
    "sampler": None,
    "steps": None,
    "seed": 0,
    "data_dir": None,
    "classifier": None,
    "reference": None,
    "split": "train",
    "resize": False,
    "samples": None,
    "metrics": list(METRICS),
    "features": "inception",
    "batch_size": None,
    "device": None,
    "precision": "exact",
    "dtype": None,
    "backend": "auto",
}
COMPUTATION = ("batch_size", "device", "precision", "dtype", "backend")
SAMPLING = ("model", "num", "guidance_scale", "sampler", "steps", "seed", *COMPUTATION)
COMPARISON = ("data_dir", "reference", "split", "resize", "metrics", "features")
# The options of DEFAULTS that each measure uses; every other one is refused.
USED = {
    "--sweep": ("model", "num", "seed", "classifier", *COMPUTATION),
    "--bits-per-dim": ("model", "num", "seed", "data_dir", "reference", "split", "resize", "device"),
    "--samples": ("samples", *COMPARISON),
    "--reference": (*SAMPLING, *COMPARISON),
    "accuracy": (*SAMPLING, "data_dir", "classifier"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="a bundled name, a folder, or hf:owner/name (default: mnist)")
    add("--num", type=int, help=f"number of samples for each measure (default: {DEFAULTS['num']})")
    add(
        "--guidance-scale",
        type=float,
        help="scale of classifier-free guidance (default: the model's for accuracy, 1 for distances)",
    )
    add("--sampler", help=f"{', '.join(SAMPLERS)} (default: the model's, or {DEFAULT_SAMPLER['sampler']})")
    add(
        "--steps",
        type=int,
        help=f"number of steps, 1 to T (default: the model's, or {DEFAULT_SAMPLER['steps']})",
    )
    add("--seed", type=int, help=f"seed of the samples (default: {DEFAULTS['seed']})")
    add(
        "--data-dir",
        help=f"torchvision's folder of {' or '.join(NAMED_SETS)}; without --reference, real images there "
        "are measured again (default: the figures that come with the classifier)",
    )
    add(
        "--classifier",
        metavar="DIR",
        help="folder of a classifier made by `python -m diffusion.classifier`, or the name of a bundled one "
        "(default: the bundled one of the model's images)",
    )
    add(
        "--reference",
        metavar="IMAGES",
        help=f"images to compare with: {', '.join(NAMED_SETS)}, a folder, zip or .npz",
    )
    add("--split", help=f"train or test, of {' or '.join(NAMED_SETS)} (default: {DEFAULTS['split']})")
    add(
        "--resize",
        action="store_true",
        help="crop each image of the reference's folder or zip to a central square, scaled to the samples' "
        "size, as `diffusion train --resize` does",
    )
    add("--samples", metavar="IMAGES", help="images to compare with the reference, instead of a model's")
    add(
        "--metrics",
        nargs="+",
        action="extend",
        help=f"measures of the comparison (default: {' '.join(METRICS)})",
    )
    add(
        "--features",
        help="inception, efficientnet-lite0, mnist-classifier, cifar10-classifier, or the folder of a "
        f"classifier (default: {DEFAULTS['features']})",
    )
    add("--bits-per-dim", action="store_true", help="compute the variational bound on --num reference images")
    add(
        "--sweep",
        action="store_true",
        help="measure the distance by steps and guidance; needs --out NAME.json",
    )
    add_computation_options(parser)
    add("--out", metavar="FILE.json", help="also write the result to this file")
    parser.set_defaults(**dict.fromkeys(DEFAULTS))  # `run` puts the defaults in, after the check of USED


def run(args: argparse.Namespace) -> None:
    _check_used(args)
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    whole_number("--num", args.num, 1)
    if args.out:
        check_writable(args.out)
    if args.sweep:
        return _sweep(args)
    if args.bits_per_dim:
        result, text = _bits(args)
    elif args.reference is not None or args.samples is not None:
        result = _compare(args)
        text = format_result(result)
    else:
        model = _model(args)
        result = evaluate(
            model,
            num=args.num,
            guidance_scale=choose_guidance(
                model, args.guidance_scale, conditional=model.num_classes is not None
            ),
            data_dir=args.data_dir,
            classifier=args.classifier,
            progress=True,
            **_sampling(args, model),
        )
        text = format_report(result)
        result["model"] = args.model
    print(text)
    if args.out:
        with replacing(Path(args.out)) as (temporary,):
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return None


def _check_used(args: argparse.Namespace) -> None:
    """ValueError for an option that the chosen measure does not use."""
    if args.sweep and args.bits_per_dim:
        raise ValueError("--sweep and --bits-per-dim are different measures: give one of them")
    if args.sweep:
        measure = "--sweep"
    elif args.bits_per_dim:
        measure = "--bits-per-dim"
    elif args.samples is not None:
        measure = "--samples"
    elif args.reference is not None:
        measure = "--reference"
    else:
        measure = "accuracy"
    for name in DEFAULTS:
        if getattr(args, name) is not None and name not in USED[measure]:
            where = "without --reference" if measure == "accuracy" else f"with {measure}"
            raise ValueError(f"--{name.replace('_', '-')} has no effect {where}: leave it out")


def _model(args: argparse.Namespace) -> DDPM:
    return load(args.model, args.device or default_device())


def _sampling(args: argparse.Namespace, model: DDPM) -> dict[str, Any]:
    sampler, steps = choose_sampler(model, args.sampler, args.steps)
    names = ("seed", "batch_size", "dtype", "backend", "precision")
    return {"sampler": sampler, "steps": steps} | {name: getattr(args, name) for name in names}


def _compare(args: argparse.Namespace) -> dict[str, Any]:
    if not args.reference:
        raise ValueError("--reference is missing: the images to compare --samples with")
    check_metrics(args.metrics)  # before features are fetched
    features = load_features(args.features)
    protocol: dict[str, Any] = {}
    if args.samples:
        samples = load_images(args.samples, split=args.split, data_dir=args.data_dir, progress=True)
        reference = _reference(args, samples.images.shape[1:])
    else:
        model = _model(args)
        shape = (model.unet.config.in_channels, *model.unet.config.image_shape)
        reference = _reference(args, shape)
        labels, num = choose_labels(model, None, args.num)
        # now rather than after the sampling
        check_comparison(torch.empty(num, *shape, device="meta"), reference.images, features, args.metrics)
        scale = 1.0 if args.guidance_scale is None else args.guidance_scale
        options = _sampling(args, model)
        x = model.sample(labels, num_samples=num, guidance_scale=scale, progress=True, **options)
        samples = ImageSet(to_uint8(x.cpu(), model.value_range), None, None, f"model {args.model}")
        protocol = {
            **options,
            "guidance scale": scale,
            "labels": "each class in turn" if labels else "none",
        }
        protocol["EMA decay"] = ema_decay(model) or "not known"
    return compare(samples, reference, features, tuple(args.metrics), protocol=protocol, progress=True)


def _reference(args: argparse.Namespace, shape: Sequence[int]) -> ImageSet:
    """The images of --reference; with --resize, of the shape [C, H, W] of the samples."""
    options: dict[str, Any] = {}
    if args.resize:
        if shape[1] != shape[2]:
            raise ValueError(f"--resize makes square images, and the samples are {shape[1]} x {shape[2]}")
        options = {"channels": shape[0], "size": shape[1]}
    found = load_images(args.reference, split=args.split, data_dir=args.data_dir, progress=True, **options)
    return found._replace(name=f"{found.name} (the middle square, scaled)") if args.resize else found


def _bits(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if not args.reference:
        raise ValueError("--reference is missing: the images to compute bits per dimension of")
    model = _model(args)
    images = _reference(args, (model.unet.config.in_channels, *model.unet.config.image_shape))
    labels = images.labels[: args.num] if images.labels is not None and model.num_classes else None
    result = bits_per_dimension(model, images.images[: args.num], labels, seed=args.seed, progress=True)
    result |= {"model": args.model, "reference": images.name, "seed": args.seed, "variance": model.variance}
    result |= {"labels": labels is not None, "ema_decay": ema_decay(model)}
    given = "with" if result["labels"] else "without"
    text = (
        f"bits per dimension  {result['bits_per_dim']:.4f} +- {result['standard_error']:.4f} "
        f"(variational bound, {result['variance']}, prior {result['prior']:.5f})\n"
        f"  on {counted(result['images'], 'image')} of {images.name}, {given} labels, seed {args.seed}, "
        f"EMA decay {result['ema_decay'] or 'not known'}"
    )
    return result, text


def _sweep(args: argparse.Namespace) -> None:
    if not args.out:
        raise ValueError("--out is missing: the .json file of the curve, beside which its .png is written")
    if Path(args.out).suffix.lower() != ".json":
        raise ValueError(f"--out must end in .json, not {args.out}; the .png is written beside it")
    check_curves(args.out)
    options = {name: getattr(args, name) for name in ("batch_size", "dtype", "backend", "precision")}
    result = sweep(
        _model(args), num=args.num, classifier=args.classifier, seed=args.seed, progress=True, **options
    )
    result["protocol"]["model"] = args.model
    save_sweep(result, args.out)
    for point in result["points"]:
        accuracy = "" if point["accuracy"] is None else f"  class accuracy {point['accuracy']:.1%}"
        print(
            f"{point['sampler']:6s}{point['steps']:5d} steps  guidance {point['guidance']:<4g} "
            f"distance {point['distance']:.4f}{accuracy}"
        )
    print(f"{args.out} and {Path(args.out).with_suffix('.png')}: {result['protocol']['distance']}")
