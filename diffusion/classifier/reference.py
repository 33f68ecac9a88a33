"""The reference for samples: statistics of real images in the features of a classifier."""

from dataclasses import dataclass
from pathlib import Path

import torch

from ..data import ImageSet
from ..utils.frechet import frechet_distance, moments
from ..utils.validation import number, numbers, refuse, typed, whole_number
from ..utils.words import counted
from .network import Classifier, classify


@dataclass(frozen=True)
class Reference:
    """Real images in the features of one classifier, which samples are measured against.

    mean [F], cov [F, F]: float64, moments of the features over a training set.
    real_random, real_balanced: Fréchet distances to the training set of disjoint samples of `sample_size`
        real test images, drawn at random or with equally many of each class. The shares of the classes vary
        in random samples, so these lie further off. Compare samples with real images drawn alike.
    sample_size: real test images in each of these samples.
    test_accuracy: share of all test images that the classifier predicts correctly, in [0, 1].
    source: one line that names the images.

    ValueError for values of another type or range.
    """

    mean: torch.Tensor
    cov: torch.Tensor
    real_random: tuple[float, ...]
    real_balanced: tuple[float, ...]
    sample_size: int
    test_accuracy: float
    source: str

    def __post_init__(self) -> None:
        checked = {
            "sample_size": whole_number("sample_size", self.sample_size, 1),
            "test_accuracy": number("test_accuracy", self.test_accuracy, 0, 1),
            "source": typed("source", self.source, str),
        }
        for name in ("real_random", "real_balanced"):
            distances = tuple(numbers(name, getattr(self, name)).tolist())
            if not distances:
                refuse(name, "at least one distance", getattr(self, name))
            checked[name] = distances
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def measure_reference(
    classifier: Classifier, train: ImageSet, test: ImageSet, sample_size: int = 1000, seed: int = 0
) -> Reference:
    """The reference of a classifier from training images and labelled test images.

    sample_size, seed: arguments of `draw_samples`, which cuts samples from the test images. ValueError if
    there are too few images.
    """
    random, balanced = draw_samples(test, classifier.config.classes, sample_size, seed)
    mean, cov = moments(classify(classifier, train.images)[0])
    features, found = classify(classifier, test.images)
    return Reference(
        mean=mean,
        cov=cov,
        real_random=tuple(frechet_distance(*moments(features[part]), mean, cov) for part in random),
        real_balanced=tuple(frechet_distance(*moments(features[part]), mean, cov) for part in balanced),
        sample_size=sample_size,
        test_accuracy=(found == test.known_labels()).double().mean().item(),
        source=(
            f"{Path(train.name).resolve().name}: {counted(len(train.images), 'training image')}; "
            f"{counted(len(test.images), 'test image')} shuffled with seed {seed}, "
            f"{counted(len(random), 'disjoint sample')} at "
            f"random, {len(balanced)} balanced"
        ),
    )


def draw_samples(
    test: ImageSet, classes: int, sample_size: int, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Indices int64 [sample_size] of disjoint samples: drawn at random, and with equally many of each class.

    The images are shuffled by the seed first, because different people wrote the two halves of MNIST's test
    digits. ValueError if there are too few images.
    """
    sample_size = whole_number("sample_size", sample_size)
    too_few = f"{test.name} has {counted(len(test.images), 'test image')}, too few for {sample_size:,}"
    if sample_size > len(test.images):
        raise ValueError(too_few)
    wanted = torch.bincount(balanced_labels(sample_size, classes), minlength=classes).tolist()
    order = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(seed), device="cpu")
    labels = test.known_labels()[order]
    pools = [_samples(order[labels == label], wanted[label]) for label in range(classes)]
    balanced = [torch.cat(parts) for parts in zip(*pools, strict=False)]
    if not balanced:
        raise ValueError(f"{too_few}, as many of each class")
    return _samples(order, sample_size), balanced


def balanced_labels(count: int, classes: int = 10) -> torch.Tensor:
    """Labels 0, 1, ..., classes - 1, 0, ..., int64 [count]; ValueError if count is below classes."""
    if whole_number("the number of images", count, most=2**31 - 1) < classes:
        raise ValueError(
            f"a balanced sample needs at least {counted(classes, 'image')}, one of each class, not {count}"
        )
    return torch.arange(count, device="cpu") % classes


def _samples(indices: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The indices cut into samples of `size`, without a shorter one at the end."""
    return [part for part in indices.split(size) if len(part) == size]
