"""Distances between two sets of images, with the protocol of how they were measured."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..data import ImageSet
from ..utils.frechet import frechet_distance, moments
from ..utils.validation import choice
from .features import Features, import_fidelity
from .protocol import ROUNDING

FRECHET = "fused-diffusion's, in float64 (utils/frechet.py)"
NEIGHBOURS = 3  # of precision and recall


class Metric(NamedTuple):
    """A measure of samples against a reference.

    compute: (features [N, F] of the samples, features [M, F] of the reference, logits [N, K] of the samples)
    to one value for each of `names`. names: of the values in a result, in Inception's features. general: the
    same in other features, whose name replaces {}. by_fidelity: whether torch-fidelity computes it.
    """

    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], tuple[float, ...]]
    names: tuple[str, ...]
    general: tuple[str, ...]
    by_fidelity: bool = True


def _fid(ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor | None) -> tuple[float, ...]:
    return (frechet_distance(*moments(ours), *moments(theirs)),)


def _kid(ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor | None) -> tuple[float, ...]:
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(1000, len(ours), len(theirs))
    values = kid_features_to_metric(ours, theirs, kid_subset_size=size, verbose=False)
    return values["kernel_inception_distance_mean"], values["kernel_inception_distance_std"]


def _inception_score(
    ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor | None
) -> tuple[float, ...]:
    from torch_fidelity.metric_isc import isc_features_to_metric

    values = isc_features_to_metric(logits)
    return values["inception_score_mean"], values["inception_score_std"]


def _precision_recall(
    ours: torch.Tensor, theirs: torch.Tensor, logits: torch.Tensor | None
) -> tuple[float, ...]:
    from torch_fidelity.metric_prc import prc_features_to_metric

    values = prc_features_to_metric(ours, theirs, prc_neighborhood=NEIGHBOURS, verbose=False)
    return values["precision"], values["recall"]


# A new metric is one entry.
METRICS = {
    "fid": Metric(_fid, ("fid",), ("frechet_distance_in_{}_features",), by_fidelity=False),
    "kid": Metric(
        _kid,
        ("kid", "kid_spread"),
        ("kernel_distance_in_{}_features", "kernel_distance_in_{}_features_spread"),
    ),
    "is": Metric(
        _inception_score,
        ("inception_score", "inception_score_spread"),
        ("classifier_score_in_{}_features", "classifier_score_in_{}_features_spread"),
    ),
    "precision-recall": Metric(
        _precision_recall, ("precision", "recall"), ("precision_in_{}_features", "recall_in_{}_features")
    ),
}


def compare(
    samples: ImageSet,
    reference: ImageSet,
    features: Features,
    metrics: tuple[str, ...] = tuple(METRICS),
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
    check_comparison(samples.images, reference.images, features, metrics)
    ours, logits = features.of(features.in_channels(samples.images), progress)
    theirs, _ = features.of(features.in_channels(reference.images), progress)
    found: dict[str, float] = {}
    for name, metric in METRICS.items():
        if name in metrics:
            general = (text.format(features.name) for text in metric.general)
            names = metric.names if features.is_inception else general
            found |= zip(names, metric.compute(ours, theirs, logits), strict=True)
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
            "versions": _versions(_by_fidelity(metrics) or features.is_inception),
        },
    }


def check_comparison(
    samples: torch.Tensor, reference: torch.Tensor, features: Features, metrics: Sequence[str]
) -> None:
    """ValueError if `compare` would refuse images [N, C, H, W] of these shapes; their values are not read."""
    check_metrics(metrics)
    for images, what in ((samples, "samples"), (reference, "reference images")):
        features.check(features.in_channels(images))
        for name in metrics:
            least = NEIGHBOURS + 1 if name == "precision-recall" else 2
            if len(images) < least:
                raise ValueError(f"{name} needs at least {least} {what}, not {len(images)}")


def check_metrics(metrics: Sequence[str]) -> None:
    """ValueError if one is unknown, if there is none, or without the torch-fidelity that one needs."""
    for name in metrics or [""]:
        choice("metric", name, METRICS)
    if _by_fidelity(metrics):
        import_fidelity()


def _by_fidelity(metrics: Sequence[str]) -> bool:
    return any(METRICS[name].by_fidelity for name in metrics)


def format_result(result: dict[str, Any]) -> str:
    """The result of `compare` as lines to print."""
    width = max(map(len, result["metrics"]))
    lines = [f"{name:{width}s}  {value:.5g}" for name, value in result["metrics"].items()]
    return "\n".join([*lines, *(f"  {name}: {value}" for name, value in result["protocol"].items())])


def _versions(fidelity: bool) -> str:
    """The versions that decide the numbers. fidelity: whether torch-fidelity computed some of them."""
    ours = f"fused-diffusion {__version__}, torch {torch.__version__}"
    return f"{ours}, torch-fidelity {version('torch-fidelity')}" if fidelity else ours
