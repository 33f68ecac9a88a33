"""What samples are measured against, in the features of a classifier."""

from dataclasses import dataclass

import torch

from ..data import ImageSet
from ..evaluation.fid import frechet_distance, moments
from ..utils.validation import number, numbers, refuse, typed, whole_number
from .network import Classifier, classify


@dataclass(frozen=True)
class Reference:
    """What samples are measured against, in the features of one classifier.

    mean [F], cov [F, F]: float64, over a training set. real_random, real_balanced: Fréchet distances from it
    of disjoint samples of `sample_size` real test images each, drawn at random or as many of each class. A
    random draw varies in its share of each class, so it lies further off; like is to be compared with like.
    test_accuracy: the classifier's share of right answers on all test images. source: one line that says
    which images all this was measured on.
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
    """Moments of training images in a classifier's features, and what labelled test images give.

    The test images are cut into samples by `draw_samples`.
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
        test_accuracy=(found == test.labels).double().mean().item(),
        source=(
            f"{train.name}: {len(train.images):,} training images; {len(test.images):,} test images shuffled "
            f"with seed {seed}, {len(random)} disjoint samples at random, {len(balanced)} balanced"
        ),
    )


def draw_samples(
    test: ImageSet, classes: int, sample_size: int, seed: int = 0
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Indices of disjoint samples of labelled images, drawn at random, and as many of each class.

    The images are shuffled (by seed) before: the second half of MNIST's test digits were written by other
    people than the first. ValueError if there are too few.
    """
    sample_size = whole_number("sample_size", sample_size)
    too_few = f"{test.name} has {len(test.images):,} test images, too few for {sample_size:,}"
    if sample_size > len(test.images):
        raise ValueError(too_few)
    wanted = torch.bincount(balanced_labels(sample_size, classes), minlength=classes).tolist()
    order = torch.randperm(len(test.images), generator=torch.Generator().manual_seed(seed), device="cpu")
    pools = [_samples(order[test.labels[order] == label], wanted[label]) for label in range(classes)]
    balanced = [torch.cat(parts) for parts in zip(*pools, strict=False)]
    if not balanced:
        raise ValueError(f"{too_few}, as many of each class")
    return _samples(order, sample_size), balanced


def balanced_labels(count: int, classes: int = 10) -> torch.Tensor:
    """Labels int64 [count] that hold each class as often as any other, or once more; at least one of each."""
    if whole_number("the number of images", count, most=2**31 - 1) < classes:
        raise ValueError(f"a balanced sample needs at least {classes} images, one of each class, not {count}")
    return torch.arange(count, device="cpu") % classes


def _samples(indices: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Disjoint whole samples of `size` from the front of `indices`."""
    return [part for part in indices.split(size) if len(part) == size]
