"""The conditions that all measures of a model with a classifier share."""

import math
from typing import Any

import torch

from ..classifier import Classifier, classify
from ..process.value_range import SIGNED
from ..storage.images import to_uint8
from ..utils.memory import check_fits
from ..utils.validation import whole_number
from ..utils.words import counted

ROUNDING = "8 bits, to nearest"


def ema_decay(model: Any) -> float | None:
    """The decay of a model's averaged weights, by its metadata; None if these do not tell."""
    training = model.metadata.get("training")
    decay = training.get("ema_decay") if isinstance(training, dict) else None
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        return None
    return decay


def check_num(classifier: Classifier, num: int) -> int:
    """`num` as an int; ValueError if it is below 1, or if so many images do not fit into memory."""
    num = whole_number("num", num, 1)
    check_fits(counted(num, "image"), 4 * num * math.prod(classifier.shape), torch.device("cpu"))
    return num


def image_shape(model: Any) -> tuple[int, ...]:
    """[C, H, W] of a model's images."""
    config = model.unet.config
    return (config.in_channels, *config.image_shape)


def check_model(model: Any, classifier: Classifier) -> None:
    """ValueError unless a model makes the classifier's images, with the same number of classes or none."""
    shape, classes = image_shape(model), classifier.config.classes
    if shape != classifier.shape or model.num_classes not in (None, classes):
        raise ValueError(
            f"the classifier {classifier.folder} is for images {'x'.join(map(str, classifier.shape))} with "
            f"{counted(classes, 'class')} or none; this model has {'x'.join(map(str, shape))} with "
            f"{model.num_classes or 'no'} classes; give another by --classifier, which "
            "python -m diffusion.classifier trains"
        )


def classify_samples(
    classifier: Classifier, samples: torch.Tensor, value_range: tuple[float, float] = SIGNED
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [N, F] and predicted classes [N] of samples [N, C, H, W] in value_range, rounded to 8 bits.

    ValueError for samples that are not finite.
    """
    if not samples.isfinite().all():
        bad = int((~samples.flatten(1).isfinite()).any(1).sum())
        raise ValueError(f"NaN or infinite values in {bad} of the model's {counted(len(samples), 'sample')}")
    return classify(classifier, to_uint8(samples.cpu(), value_range))
