"""Distances between two sets of images, with the protocol of how they were measured."""

from importlib.metadata import version
from typing import Any

import torch

from .. import __version__
from ..data import ImageSet
from ..utils.frechet import frechet_distance, moments
from ..utils.validation import choice
from .features import Features, import_fidelity
from .protocol import ROUNDING

METRICS = ("fid", "kid", "is", "precision-recall")
FRECHET = "fused-diffusion's, in float64 (utils/frechet.py)"
NEIGHBOURS = 3  # for precision and recall


def compare(
    samples: ImageSet,
    reference: ImageSet,
    features: Features,
    metrics: tuple[str, ...] = METRICS,
    *,
    protocol: dict[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Metrics of samples against a reference, in the features of a network.

    metrics: any of METRICS.
        "fid": Fréchet distance (Heusel et al. 2017, arXiv 1706.08500, eq. 6) by `frechet_distance`, never
        negative; torch-fidelity computes the others.
        "kid": mean and standard deviation, over 100 subsets of at most 1000 images, of the unbiased squared
        MMD with kernel (x.y / F + 1)^3 (Bińkowski et al. 2018, arXiv 1801.01401).
        "is": Inception Score in 10 splits (Salimans et al. 2016, arXiv 1606.03498).
        "precision-recall": with 3 neighbours (Kynkäänniemi et al. 2019, arXiv 1904.06991).
    protocol: how the samples were made, as far as it is known.
    progress: show a bar with images/s.

    Returns a dict that JSON can hold, with `metrics` and `protocol`. Only metrics in Inception's features are
    named `fid`, `kid` and `inception_score`; in other features they are `frechet_distance_in_..._features`
    and so on. ValueError for an unknown metric, images that do not fit the features, or without
    torch-fidelity.
    """
    for metric in metrics or [""]:
        choice("metric", metric, METRICS)
    if set(metrics) != {"fid"}:
        import_fidelity()
    ours, logits = features.of(_in_channels(samples, features), progress)
    theirs, _ = features.of(_in_channels(reference, features), progress)
    names = _names(features)
    found: dict[str, Any] = {}
    if "fid" in metrics:
        found[names["fid"]] = frechet_distance(*moments(ours), *moments(theirs))
    if "kid" in metrics:
        from torch_fidelity.metric_kid import kid_features_to_metric

        size = min(1000, len(ours), len(theirs))
        values = kid_features_to_metric(ours, theirs, kid_subset_size=size, verbose=False)
        found[names["kid"]] = values["kernel_inception_distance_mean"]
        found[f"{names['kid']}_spread"] = values["kernel_inception_distance_std"]
    if "is" in metrics:
        from torch_fidelity.metric_isc import isc_features_to_metric

        values = isc_features_to_metric(logits)
        found[names["is"]] = values["inception_score_mean"]
        found[f"{names['is']}_spread"] = values["inception_score_std"]
    if "precision-recall" in metrics:
        if min(len(ours), len(theirs)) <= NEIGHBOURS:
            raise ValueError(f"precision and recall need more than {NEIGHBOURS} images on each side")
        from torch_fidelity.metric_prc import prc_features_to_metric

        values = prc_features_to_metric(ours, theirs, prc_neighborhood=NEIGHBOURS, verbose=False)
        found |= {names[name]: values[name] for name in ("precision", "recall")}
    return {
        "metrics": found,
        "protocol": {
            "samples": samples.name,
            "number of samples": len(samples.images),
            "reference": reference.name,
            "number of reference images": len(reference.images),
            "rounding": ROUNDING,
            "feature network": features.name,
            "feature network's SHA-256": features.sha256,
            **({"feature network's input": features.input} if features.input else {}),
            **({"Fréchet distance": FRECHET} if "fid" in metrics else {}),
            **(protocol or {}),
            "versions": _versions(set(metrics) != {"fid"} or features.is_inception),
        },
    }


def format_result(result: dict[str, Any]) -> str:
    """The result of `compare` as lines to print."""
    width = max(map(len, result["metrics"]))
    lines = [f"{name:{width}s}  {value:.5g}" for name, value in result["metrics"].items()]
    return "\n".join([*lines, *(f"  {name}: {value}" for name, value in result["protocol"].items())])


def _names(features: Features) -> dict[str, str]:
    """The names of the metrics in a result, which say the features unless these are Inception's."""
    names: tuple[str, ...] = ("fid", "kid", "inception_score", "precision", "recall")
    if not features.is_inception:
        names = tuple(
            f"{name}_in_{features.name}_features"
            for name in ("frechet_distance", "kernel_distance", "classifier_score", "precision", "recall")
        )
    return dict(zip(("fid", "kid", "is", "precision", "recall"), names, strict=True))


def _in_channels(images: ImageSet, features: Features) -> torch.Tensor:
    """The images; grey ones are repeated for a network of colour images."""
    colour = features.shape is not None and features.shape[0] == 3
    return images.images.expand(-1, 3, -1, -1) if colour and images.images.shape[1] == 1 else images.images


def _versions(fidelity: bool) -> str:
    """The versions that decide the numbers. fidelity: whether torch-fidelity computed some of them."""
    ours = f"fused-diffusion {__version__}, torch {torch.__version__}"
    return f"{ours}, torch-fidelity {version('torch-fidelity')}" if fidelity else ours
