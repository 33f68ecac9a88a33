"""A classifier that judges the samples of diffusion models; it is trained without any diffusion model.

`python -m diffusion.classifier --data mnist --data-dir DIR --out FOLDER` trains it on MNIST's 60,000 training
digits and writes the files that the package ships: the weights, the moments of its features over the training
set, and the Fréchet distances of real test digits. cifar10 and folders and zips of images work alike. Colour
images get a residual network, which is trained differently (see `train_classifier`).
"""

from typing import TYPE_CHECKING

from ..utils.modules import importing

if TYPE_CHECKING:  # `__getattr__` imports each name when it is first used
    from .network import Classifier, classify
    from .reference import Reference, balanced_labels, measure_reference
    from .storage import BUNDLED, bundled_classifiers, classifier_of, load_classifier, save_classifier
    from .training import augment, crop, train_classifier

__all__ = [
    "BUNDLED",
    "Classifier",
    "Reference",
    "augment",
    "balanced_labels",
    "bundled_classifiers",
    "classifier_of",
    "classify",
    "crop",
    "load_classifier",
    "measure_reference",
    "save_classifier",
    "train_classifier",
]

# The module that defines each name.
_MODULES = {
    "BUNDLED": "storage",
    "Classifier": "network",
    "Reference": "reference",
    "augment": "training",
    "balanced_labels": "reference",
    "bundled_classifiers": "storage",
    "classifier_of": "storage",
    "classify": "network",
    "crop": "training",
    "load_classifier": "storage",
    "measure_reference": "reference",
    "save_classifier": "storage",
    "train_classifier": "training",
}
__getattr__ = importing(__name__, _MODULES)  # so that the command's help needs no PyTorch
