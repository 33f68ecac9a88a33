"""The quality of a model's images: class accuracy, and the distance to real images."""

import os
import statistics
from collections import Counter
from typing import Any

import torch

from .. import __version__
from ..classifier import (
    Classifier,
    Reference,
    balanced_labels,
    classifier_of,
    load_classifier,
    measure_reference,
)
from ..data import NAMED_SETS, load_dataset
from ..storage.reading import sha256
from ..utils.frechet import frechet_distance, moments
from ..utils.validation import number, whole_number
from ..utils.words import counted
from .protocol import ROUNDING, check_model, check_num, classify_samples, ema_decay, image_shape


def class_accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """The share of samples whose predicted class is their label.

    predicted, labels: int64 [N]. Returns `samples`, `correct`, `accuracy` in [0, 1], `by_class` (the accuracy
    of each label) and `misread` (for each confused pair, most frequent first, the label `asked`, the
    predicted class `seen` and the `count`). ValueError if N is 0 or differs.
    """
    if predicted.shape != labels.shape or predicted.ndim != 1 or len(predicted) == 0:
        raise ValueError(
            f"predicted and labels must both be [N], not {list(predicted.shape)} and {list(labels.shape)}"
        )
    pairs = Counter((asked, seen) for asked, seen in zip(labels.tolist(), predicted.tolist(), strict=True))
    misread = sorted((-count, asked, seen) for (asked, seen), count in pairs.items() if asked != seen)
    correct = len(labels) + sum(entry[0] for entry in misread)
    return {
        "samples": len(labels),
        "correct": correct,
        "accuracy": correct / len(labels),
        "by_class": [
            {"asked": label, "accuracy": (predicted[labels == label] == label).double().mean().item()}
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
    """Class accuracy with guidance and Fréchet distance without it, measured with a classifier.

    model: a DDPM of the classifier's images, conditional on its K classes or unconditional (then only the
        distance is measured).
    num: samples for each measurement; sample k has label k % K.
    guidance_scale: for the class accuracy. sampler, steps, seed, batch_size, progress: of `DDPM.sample`;
        steps=None is the full chain.
    data_dir: torchvision's folder. If given, the reference (moments of the training images, distances of real
        test images in samples of `num`) is measured there, on the named data set of the classifier; by
        default it is the one stored beside the classifier.
    classifier: a folder that `python -m diffusion.classifier` wrote, or the name of a bundled classifier; by
        default the bundled one of the model's images.
    options: further arguments of `DDPM.sample`, such as backend, dtype and device.

    Samples are rounded to 8 bits, as real images are, before the classifier sees them. The Fréchet distance
    (Heusel et al. 2017, arXiv 1706.08500, equation 6) is taken in the classifier's penultimate features, not
    in Inception's, so it compares only with distances in the same features. `ratio` is the distance divided
    by that of real test images drawn as the samples are: as many of each class for a conditional model, at
    random for an unconditional one; `real` has both. The distance shrinks with the number of samples, so a
    ratio is None if the real images were measured in samples of another size than `num`.

    Returns a dict that JSON can hold, with `classifier` (among others the SHA-256 of its weights), `protocol`
    (all other conditions, and the decay of the averaged weights if the model names it), `class_accuracy`
    (None for an unconditional model; with the model's `class_names`, or None) and `frechet`; `format_report`
    formats it. ValueError for a model of other images, num below K, or samples that are not finite.
    """
    network, reference = load_classifier(
        classifier_of(image_shape(model)) if classifier is None else classifier
    )
    check_model(model, network)
    num, steps = check_num(network, num), None if steps is None else whole_number("steps", steps, 1)
    seed, guidance_scale = whole_number("seed", seed, 0), number("guidance_scale", guidance_scale)
    labels = balanced_labels(num, network.config.classes)
    if data_dir is not None:
        name = _named_set(network, reference.source)
        train, test = (load_dataset(name, split=split, data_dir=data_dir) for split in ("train", "test"))
        reference = measure_reference(network, train, test, sample_size=num)
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
        accuracy = class_accuracy(classify_samples(network, samples, model.value_range)[1], labels)
        accuracy["guidance_scale"] = guidance_scale
        accuracy["class_names"] = model.class_names and list(model.class_names)
        samples = model.sample(labels=labels.tolist(), guidance_scale=1.0, **options)
    else:
        samples = model.sample(num_samples=num, **options)
    return {
        "classifier": {
            "path": str(network.folder),
            "sha256": sha256(network.folder / "model.safetensors"),
            "test_accuracy": reference.test_accuracy,
            "feature_dimension": network.num_features,
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
            classify_samples(network, samples, model.value_range)[0],
            reference,
            "random" if accuracy is None else "balanced",
        ),
    }


def _named_set(classifier: Classifier, source: str) -> str:
    """The name in NAMED_SETS of the classifier's images; ValueError if no set has images of its shape.

    source: of its stored reference, which begins with the name of the data; of several sets of one shape it
    tells the classifier's.
    """
    names = [name for name, named in NAMED_SETS.items() if named.shape == classifier.shape]
    if not names:
        shape = "x".join(map(str, classifier.shape))
        raise ValueError(f"no data set of --data-dir has images {shape}: choose from {', '.join(NAMED_SETS)}")
    return next((name for name in names if source.casefold().startswith(name)), names[0])


def format_report(result: dict[str, Any]) -> str:
    """The result of `evaluate` as lines to print."""
    classifier, protocol = result["classifier"], result["protocol"]
    accuracy, frechet = result["class_accuracy"], result["frechet"]
    steps = "full chain" if protocol["steps"] is None else counted(protocol["steps"], "step")
    lines = [
        f"classifier  {classifier['path']}, {classifier['test_accuracy']:.2%} of real test images, "
        f"SHA-256 {classifier['sha256']}",
        f"samples     {protocol['samples']:,}, {protocol['sampler']}, {steps}, seed {protocol['seed']}, "
        f"EMA decay {protocol['ema_decay'] or 'not known'}, rounded to {protocol['rounding']}",
    ]
    if accuracy:
        lines.append(
            f"accuracy    {accuracy['accuracy']:.1%} class accuracy "
            f"({accuracy['correct']:,} of {accuracy['samples']:,}, guidance {accuracy['guidance_scale']:g})"
        )
        names = accuracy["class_names"]

        def named(label: int) -> str:
            return str(label) if names is None else names[label]

        shares = (f"{named(entry['asked'])}: {entry['accuracy']:.1%}" for entry in accuracy["by_class"])
        lines.append(f"by class    {', '.join(shares)}")
        pairs = (
            f"{named(pair['asked'])} as {named(pair['seen'])}: {pair['count']}"
            for pair in accuracy["misread"]
        )
        lines.append(f"misread     {', '.join(pairs) or 'none'}")
    features = f"{os.path.basename(classifier['path'])} features"
    lines.append(
        f"distance    {frechet['distance']:.4f} Fréchet distance in {features} "
        f"({classifier['feature_dimension']} of them, guidance 1)"
    )
    for drawn, how in (("balanced", "as many of each class"), ("random", "at random")):
        real = frechet["real"][drawn]
        ratio = f"no ratio to {counted(protocol['samples'], 'sample')}: for one, give "
        ratio += f"--num {frechet['real_samples']}, or measure real images by --data-dir"
        if real["ratio"] is not None:
            ratio = f"ratio {real['ratio']:.2f}"
        lines.append(
            f"real        {real['distance']:.4f} (+- {real['spread']:.4f}) that of "
            f"{counted(frechet['real_samples'], 'real test image')}, {how}: {ratio}"
        )
    lines.append(f"reference   {frechet['reference']}")
    lines.append(f"versions    {protocol['versions']}")
    return "\n".join(lines)


def _frechet(features: torch.Tensor, reference: Reference, drawn: str) -> dict[str, Any]:
    """The distance of features [N, F] and those of real images; `ratio` is to the real images drawn alike.

    drawn: how the samples' labels were drawn, "balanced" or "random".
    """
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
