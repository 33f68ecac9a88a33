"""The folder of a classifier: its weights, its reference, and how it was made."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..files import replacing
from ..reading import check_finite, check_weights, load_weights, read_json, read_safetensors
from .network import Classifier, ClassifierConfig
from .reference import Reference

BUNDLED = Path(__file__).parent.parent / "weights" / "mnist-classifier"
FORMAT = "fused-diffusion-digit-classifier"


def load_classifier(folder: str | os.PathLike | None = None) -> tuple[Classifier, Reference]:
    """The classifier in a folder, ready for inference on the CPU, and the reference stored beside it.

    folder: what `python -m diffusion.classifier` wrote; by default the one that is bundled. ValueError if a
    file is missing, damaged or of another architecture.
    """
    folder = Path(folder) if folder is not None else BUNDLED
    try:
        card = read_json(folder / "config.json")
        if card.get("format") != FORMAT:
            raise ValueError(f"its config.json does not say format {FORMAT}")
        classifier = Classifier(ClassifierConfig(**card.get("network", {})))
        load_weights(classifier, read_safetensors(folder / "model.safetensors"), folder / "model.safetensors")
        stored = read_safetensors(folder / "statistics.safetensors")
        check_weights(stored, folder / "statistics.safetensors")
        for name, tensor in stored.items():
            check_finite(name, tensor, folder / "statistics.safetensors")
        real = {name: tuple(stored[name].tolist()) for name in ("real_random", "real_balanced")}
        reference = Reference(mean=stored["mean"], cov=stored["cov"], **real, **card["reference"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} holds no usable classifier: {reason}") from error
    classifier.folder = folder
    return classifier.eval().requires_grad_(False), reference


def save_classifier(
    folder: str | os.PathLike, classifier: Classifier, reference: Reference, training: dict
) -> None:
    """Writes what `load_classifier` reads; `training` (JSON-able) tells how the classifier was made."""
    folder = Path(folder)
    numbers = {
        "mean": reference.mean,
        "cov": reference.cov,
        "real_random": torch.tensor(reference.real_random, dtype=torch.float64),
        "real_balanced": torch.tensor(reference.real_balanced, dtype=torch.float64),
    }
    card = {
        "format": FORMAT,
        "network": asdict(classifier.config),
        "reference": {
            "sample_size": reference.sample_size,
            "test_accuracy": reference.test_accuracy,
            "source": reference.source,
        },
        "training": training,
    }
    targets = [folder / name for name in ("model.safetensors", "statistics.safetensors", "config.json")]
    with replacing(*targets) as (model_path, statistics_path, card_path):
        save_file(stored(classifier), model_path)
        save_file(numbers, statistics_path)
        card_path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def stored(classifier: Classifier) -> dict[str, torch.Tensor]:
    """Its state as it is stored: kernels and matrices in float16, vectors as they are."""
    return {
        name: (value.half() if value.ndim > 1 else value).contiguous()
        for name, value in classifier.state_dict().items()
    }
