"""Curves of the Fréchet distance over evaluations of the network and over guidance, for each sampler."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..classifier import balanced_labels, classifier_of, load_classifier
from ..samplers import EVALUATE_TWICE, SAMPLERS
from ..storage.atomic import check_writable, replacing
from ..storage.reading import sha256
from ..utils.frechet import frechet_distance, moments
from ..utils.validation import whole_number
from ..utils.words import counted
from .protocol import ROUNDING, check_model, check_num, classify_samples, ema_decay, image_shape


def sweep(
    model: Any,
    *,
    num: int = 1000,
    samplers: Sequence[str] = tuple(SAMPLERS),
    steps: Sequence[int] = (4, 8, 10, 20, 50),
    guidance: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 5.0),
    classifier: str | os.PathLike | None = None,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Fréchet distances of a model's samples, in a classifier's features, along two curves for each sampler.

    The first curve runs over the number of `steps`, at guidance 1. The second runs over the scales in
    `guidance`, at the last of `steps`; an unconditional model has none. num: samples for each point.
    classifier, seed: as for `accuracy.evaluate`. options: of `DDPM.sample`. Returns a dict that JSON can
    hold: `points`, each with `sampler`, `steps`, `evaluations` (of the network, for an image; guidance takes
    two for one), `guidance`, `distance` and `accuracy` (class accuracy; None for an unconditional model), and
    `protocol`. ValueError as from `evaluate`.
    """
    network, reference = load_classifier(
        classifier_of(image_shape(model)) if classifier is None else classifier
    )
    check_model(model, network)
    num, seed = check_num(network, num), whole_number("seed", seed, 0)
    conditional = model.num_classes is not None
    labels = balanced_labels(num, network.config.classes)
    asked = {"labels": labels.tolist()} if conditional else {"num_samples": num}
    wanted = [(count, 1.0) for count in steps]
    if conditional:
        wanted += [(steps[-1], scale) for scale in guidance if (steps[-1], scale) not in wanted]
    for sampler in samplers:  # fails now rather than after some of the points
        for count, scale in wanted:
            model.steps(sampler, count, guidance_scale=scale)
    points = []
    for sampler in samplers:
        for count, scale in wanted:
            x = model.sample(
                **asked,
                sampler=sampler,
                steps=count,
                guidance_scale=scale,
                seed=seed,
                progress=progress,
                **options,
            )
            features, read = classify_samples(network, x, model.value_range)
            evaluations = 2 * count - 1 if sampler in EVALUATE_TWICE else count
            point = {"sampler": sampler, "steps": count, "evaluations": evaluations, "guidance": scale}
            point["distance"] = frechet_distance(*moments(features), reference.mean, reference.cov)
            point["accuracy"] = (read == labels).double().mean().item() if conditional else None
            points.append(point)
    protocol = {
        "distance": f"Fréchet distance in {network.folder.name} features; not FID",
        "feature network's SHA-256": sha256(network.folder / "model.safetensors"),
        "number of samples": num,
        "labels": "each class in turn" if conditional else "none",
        "seed": seed,
        "reference": reference.source,
        "rounding": ROUNDING,
        "EMA decay": ema_decay(model) or "not known",
        **options,
    }
    return {"points": points, "protocol": protocol}


def check_curves(path: str | os.PathLike) -> type[Any]:
    """matplotlib's Figure; ValueError if `save_sweep` could not write to `path`, or matplotlib is missing."""
    check_writable(path, Path(path).with_suffix(".png"))
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f'the curves need matplotlib ({error}); pip install "fused-diffusion[evaluate]"'
        ) from error
    return Figure


def save_sweep(result: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes the result of `sweep` as JSON, and the curves beside it as PNG; needs matplotlib."""
    Figure = check_curves(path)
    path, points = Path(path), result["points"]
    last = max(point["steps"] for point in points)
    counts = sorted({p["evaluations"] for p in points if p["evaluations"] == p["steps"]})
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for sampler in dict.fromkeys(point["sampler"] for point in points):
        own = [point for point in points if point["sampler"] == sampler]
        for axes, x, chosen in (
            (left, "evaluations", [p for p in own if p["guidance"] == 1]),
            (right, "guidance", sorted((p for p in own if p["steps"] == last), key=lambda p: p["guidance"])),
        ):
            axes.plot([p[x] for p in chosen], [p["distance"] for p in chosen], "o-", label=sampler)
    left.set(xlabel="evaluations of the network, guidance 1", xscale="log", ylabel="distance")
    left.set_ylim(bottom=0)
    left.set_xticks(counts, [str(count) for count in counts])
    left.minorticks_off()
    right.set(xlabel=f"guidance scale, {counted(last, 'step')}", ylim=(0, None))
    left.legend()
    title = (
        f"{result['protocol']['distance']}; "
        f"{counted(result['protocol']['number of samples'], 'sample')} a point"
    )
    figure.suptitle(title.encode(errors="backslashreplace").decode())  # the name of a folder may not be UTF-8
    with replacing(path, path.with_suffix(".png")) as (as_json, as_png):
        as_json.write_text(json.dumps(result, indent=1) + "\n")
        figure.savefig(as_png, format="png", dpi=100)
