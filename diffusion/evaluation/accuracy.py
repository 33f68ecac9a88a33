"""How good a model's images are: read by an independent classifier, and compared with real ones."""

import math
import os
import statistics
from collections import Counter
from typing import Any

import torch

from .. import __version__
from ..classifier import Classifier, Reference, balanced_labels, classify, load_classifier, measure_reference
from ..data import load_dataset
from ..storage.images import to_uint8
from ..storage.reading import sha256
from ..utils.memory import check_fits
from ..utils.validation import number, whole_number
from .fid import frechet_distance, moments

ROUNDING = "8 bits, to nearest"


def class_accuracy(digits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """How many classes int64 [N], as a classifier read them, are the labels int64 [N] that were asked for.

    Returns `samples`, `correct`, `accuracy` in [0, 1], `by_class`, the accuracy of each label that was asked
    for, and `misread`: for each pair that was confused, most frequent first, what was `asked`, what was
    `seen` and the `count`. ValueError if N is 0 or differs.
    """
    if digits.shape != labels.shape or digits.ndim != 1 or len(digits) == 0:
        raise ValueError(
            f"digits and labels must both be [N], not {list(digits.shape)} and {list(labels.shape)}"
        )
    pairs = Counter((asked, seen) for asked, seen in zip(labels.tolist(), digits.tolist(), strict=True))
    misread = sorted((-count, asked, seen) for (asked, seen), count in pairs.items() if asked != seen)
    correct = len(labels) + sum(entry[0] for entry in misread)
    return {
        "samples": len(labels),
        "correct": correct,
        "accuracy": correct / len(labels),
        "by_class": [
            {"asked": label, "accuracy": (digits[labels == label] == label).double().mean().item()}
            for label in labels.unique().tolist()
        ],
        "misread": [{"asked": asked, "seen": seen, "count": -count} for count, asked, seen in misread],
    }


def evaluate(
    model: Any,
    *,
    num: int = 1000,
    guidance_scale: float = 2.0,
    sampler: str = "ddim",
    steps: int | None = 50,
    seed: int = 0,
    data_dir: str | os.PathLike | None = None,
    classifier: str | os.PathLike | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Class accuracy under guidance and Fréchet distance without it, in the eyes of a classifier.

    model: a DDPM of the classifier's images, conditional on its K classes or unconditional (then only the
    distance is measured). num: samples for each measurement, label k % K for sample k. steps=None is the
    full chain. classifier: a folder that `python -m diffusion.classifier` wrote, by default the bundled one
    of MNIST's digits. data_dir: measure the reference (training moments, real test images) on MNIST, or for
    images of 3 channels on CIFAR-10, there, for samples of `num` images, instead of taking what is stored
    beside the classifier. options: further arguments of `DDPM.sample`, such as backend, dtype and device.

    Samples are rounded to 8 bits like real images before the classifier sees them. The Fréchet distance is
    that of Heusel et al. 2017 (equation 6) in this classifier's penultimate features, not in Inception's:
    it compares with itself only. A model's `ratio` is to real test images drawn as its samples are, as many
    of each class for a conditional model and at random for an unconditional one; `real` has both. The
    distance shrinks with the number of samples, so a ratio is None where the real images were measured for
    another number than `num`.

    Returns a JSON-able dict with `classifier` (its weights' SHA-256 among the rest), `protocol` (what else
    decides the numbers, and the decay of the averaged weights if the model says it), `class_accuracy` (None
    if unconditional) and `frechet`; `format_report` prints it. ValueError for a model of other images, num
    below K, or samples that are not finite.
    """
    judge, reference = load_classifier(classifier)
    check_model(model, judge)
    num, steps = check_num(judge, num), None if steps is None else whole_number("steps", steps, 1)
    seed, guidance_scale = whole_number("seed", seed, 0), number("guidance_scale", guidance_scale)
    labels = balanced_labels(num, judge.config.classes)
    if data_dir is not None:
        name = "mnist" if judge.config.channels == 1 else "cifar10"
        sets = (load_dataset(name, split=split, data_dir=data_dir) for split in ("train", "test"))
        reference = measure_reference(judge, *sets, sample_size=num)
    options |= {
        "sampler": sampler,
        "steps": steps,
        "seed": seed,
        "batch_size": batch_size,
        "progress": progress,
    }

    accuracy = None
    if model.num_classes is not None:
        samples = model.sample(labels=labels.tolist(), guidance_scale=guidance_scale, **options)
        accuracy = class_accuracy(_read(judge, samples)[1], labels)
        accuracy["guidance_scale"] = guidance_scale
        samples = model.sample(labels=labels.tolist(), guidance_scale=1.0, **options)
    else:
        samples = model.sample(num_samples=num, **options)
    return {
        "classifier": {
            "path": str(judge.folder),
            "sha256": sha256(judge.folder / "model.safetensors"),
            "test_accuracy": reference.test_accuracy,
            "feature_dimension": judge.num_features,
        },
        "protocol": {
            "samples": num,
            "rounding": ROUNDING,
            "sampler": sampler,
            "steps": steps,
            "seed": seed,
            "ema_decay": ema_decay(model),
            "versions": f"fused-diffusion {__version__}, torch {torch.__version__}",
        },
        "class_accuracy": accuracy,
        "frechet": _frechet(
            _read(judge, samples)[0], reference, "random" if accuracy is None else "balanced"
        ),
    }


def format_report(result: dict[str, Any]) -> str:
    """The result of `evaluate` as lines to print."""
    judge, protocol = result["classifier"], result["protocol"]
    accuracy, frechet = result["class_accuracy"], result["frechet"]
    steps = "full chain" if protocol["steps"] is None else f"{protocol['steps']} steps"
    lines = [
        f"classifier  {judge['path']}, {judge['test_accuracy']:.2%} of real test images, "
        f"SHA-256 {judge['sha256']}",
        f"samples     {protocol['samples']:,}, {protocol['sampler']}, {steps}, seed {protocol['seed']}, "
        f"EMA decay {protocol['ema_decay'] or 'not known'}, rounded to {protocol['rounding']}",
    ]
    if accuracy:
        lines.append(
            f"accuracy    {accuracy['accuracy']:.1%} are seen as the class asked for "
            f"({accuracy['correct']:,} of {accuracy['samples']:,}, guidance {accuracy['guidance_scale']:g})"
        )
        shares = (f"{entry['asked']}: {entry['accuracy']:.1%}" for entry in accuracy["by_class"])
        lines.append(f"by class    {', '.join(shares)}")
        pairs = (f"{pair['asked']} as {pair['seen']}: {pair['count']}" for pair in accuracy["misread"])
        lines.append(f"misread     {', '.join(pairs) or 'none'}")
    features = f"{os.path.basename(judge['path'])} features"
    lines.append(
        f"distance    {frechet['distance']:.4f} Fréchet distance in {features} "
        f"({judge['feature_dimension']} of them, guidance 1)"
    )
    for drawn, how in (("balanced", "as many of each class"), ("random", "at random")):
        real = frechet["real"][drawn]
        ratio = "no ratio: give --data-dir" if real["ratio"] is None else f"ratio {real['ratio']:.2f}"
        lines.append(
            f"real        {real['distance']:.4f} (+- {real['spread']:.4f}) that of "
            f"{frechet['real_samples']:,} real test images, {how}: {ratio}"
        )
    lines.append(f"reference   {frechet['reference']}")
    lines.append(f"versions    {protocol['versions']}")
    return "\n".join(lines)


def ema_decay(model: Any) -> float | None:
    """Of the averaged weights that a model trained here consists of, which it says; None for others."""
    training = model.metadata.get("training")
    decay = training.get("ema_decay") if isinstance(training, dict) else None
    return decay if isinstance(decay, int | float) else None


def check_num(judge: Classifier, num: int) -> int:
    """`num` as an int; ValueError unless it is a number of images that the memory holds."""
    num = whole_number("num", num, 1)
    check_fits(f"{num:,} images", 4 * num * math.prod(judge.shape), torch.device("cpu"))
    return num


def check_model(model: Any, judge: Classifier) -> None:
    config, classes = model.unet.config, judge.config.classes
    shape = (config.in_channels, *config.image_shape)
    if shape != judge.shape or model.num_classes not in (None, classes):
        raise ValueError(
            f"the classifier {judge.folder} is for images {'x'.join(map(str, judge.shape))} with {classes} "
            f"classes or none; this model has {'x'.join(map(str, shape))} with {model.num_classes or 'no'} "
            "classes; give another --classifier"
        )


def _read(judge: Classifier, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and digits of samples in [-1, 1], rounded to 8 bits."""
    if not samples.isfinite().all():
        bad = int((~samples.flatten(1).isfinite()).any(1).sum())
        raise ValueError(f"{bad} of the model's {len(samples)} samples hold NaN or infinite values")
    return classify(judge, to_uint8(samples.cpu()))


def _frechet(features: torch.Tensor, reference: Reference, drawn: str) -> dict[str, Any]:
    """The distance of features [N, F], and those of real digits; `ratio` is to those that are drawn alike."""
    distance = frechet_distance(*moments(features), reference.mean, reference.cov)
    comparable = reference.sample_size == len(features)
    real = {}
    for name, distances in (("balanced", reference.real_balanced), ("random", reference.real_random)):
        mean = statistics.fmean(distances)
        spread = statistics.stdev(distances) if len(distances) > 1 else 0.0
        real[name] = {"distance": mean, "spread": spread, "ratio": distance / mean if comparable else None}
    return {
        "distance": distance,
        "guidance_scale": 1.0,
        "ratio": real[drawn]["ratio"],
        "drawn": drawn,
        "real": real,
        "real_samples": reference.sample_size,
        "reference": reference.source,
    }
