"""Reads and writes the folder of a classifier: its weights, its reference, and how it was trained."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..storage.atomic import replacing
from ..storage.reading import (
    check_finite,
    check_weights,
    load_weights,
    read_json,
    read_safetensors,
    sha256,
    stored_digest,
)
from ..utils.errors import one_line
from ..utils.names import own_name
from .network import Classifier, ClassifierConfig
from .reference import Reference

WEIGHTS = Path(__file__).parent.parent / "weights"
BUNDLED = WEIGHTS / "mnist-classifier"
DIGESTS = {"model.safetensors": "weights_sha256", "statistics.safetensors": "statistics_sha256"}
FORMAT = "fused-diffusion-digit-classifier"


def bundled_classifiers() -> dict[str, Path]:
    """The folders of the bundled classifiers, by their names."""
    return {path.name: path for path in sorted(WEIGHTS.glob("*-classifier"))}


def classifier_of(shape: tuple[int, ...]) -> Path:
    """The folder of the bundled classifier of images [C, H, W]; that of digits where there is none."""
    for folder in bundled_classifiers().values():
        config = ClassifierConfig(**read_json(folder / "config.json").get("network", {}))
        if (config.channels, config.size, config.size) == tuple(shape):
            return folder
    return BUNDLED


def load_classifier(
    folder: str | os.PathLike | None = None, verify: bool = True
) -> tuple[Classifier, Reference]:
    """The classifier in a folder, ready for inference on the CPU, and the reference stored beside it.

    folder: written by `python -m diffusion.classifier`, or the name of a bundled classifier, such as
    "cifar10-classifier", which goes before a folder (see `names.own_name`); by default the bundled classifier
    of digits. verify: refuse files whose SHA-256
    differs from the one in config.json, if it has one. ValueError if a file is missing, damaged or of another
    architecture.
    """
    bundled = own_name(folder, bundled_classifiers(), "classifier")
    folder = BUNDLED if folder is None else WEIGHTS / bundled if bundled else Path(folder)
    try:
        config = read_json(folder / "config.json")
        if config.get("format") != FORMAT:
            raise ValueError(f"its config.json does not say format {FORMAT}")
        with torch.device("cpu"):
            classifier = Classifier(ClassifierConfig(**config.get("network", {})))
        tensors = {}
        for name, key in DIGESTS.items():
            digest = stored_digest(config, key, folder / "config.json") if verify else None
            tensors[name] = read_safetensors(folder / name, digest)
        weights, stored = tensors.values()
        load_weights(classifier, weights, folder / "model.safetensors")
        check_weights(stored, folder / "statistics.safetensors")
        check_finite(stored, folder / "statistics.safetensors")
        names = ("real_random", "real_balanced")
        real: dict[str, Any] = {name: tuple(stored[name].tolist()) for name in names}
        reference = Reference(mean=stored["mean"], cov=stored["cov"], **real, **config["reference"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{folder} holds no usable classifier: {one_line(error)}") from error
    classifier.folder = folder
    return classifier.eval().requires_grad_(False), reference


def save_classifier(
    folder: str | os.PathLike, classifier: Classifier, reference: Reference, training: dict
) -> None:
    """Writes the folder that `load_classifier` reads. training: JSON values that tell how it was trained."""
    folder = Path(folder)
    numbers = {
        "mean": reference.mean,
        "cov": reference.cov,
        "real_random": torch.tensor(reference.real_random, dtype=torch.float64, device="cpu"),
        "real_balanced": torch.tensor(reference.real_balanced, dtype=torch.float64, device="cpu"),
    }
    config = {
        "format": FORMAT,
        "network": asdict(classifier.config),
        "reference": {
            "sample_size": reference.sample_size,
            "test_accuracy": reference.test_accuracy,
            "source": reference.source,
        },
        "training": training,
    }
    tensors = {"model.safetensors": stored(classifier), "statistics.safetensors": numbers}
    targets = [folder / name for name in (*DIGESTS, "config.json")]
    with replacing(*targets) as (model_path, statistics_path, config_path):
        for (name, key), path in zip(DIGESTS.items(), (model_path, statistics_path), strict=True):
            check_finite(tensors[name], f"cannot write {folder / name}")
            save_file(tensors[name], path)
            config[key] = sha256(path)
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def stored(classifier: Classifier) -> dict[str, torch.Tensor]:
    """The state of a classifier as it is stored: kernels and matrices in float16, vectors unchanged."""
    return {
        name: (value.half() if value.ndim > 1 else value).contiguous()
        for name, value in classifier.state_dict().items()
    }
