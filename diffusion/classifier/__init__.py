"""A classifier, trained apart from any diffusion model, which judges what a model samples.

`python -m diffusion.classifier --data mnist --data-dir DIR --out FOLDER` trains it on MNIST's 60,000 training
digits and writes what the package ships: the weights, the moments of their features over the training set,
and how far real test digits are from them. It does the same for cifar10, and for folders and zips of images;
those in colour are read by a residual network, which trains by other means (`train_classifier`).
"""

from .network import Classifier, classify
from .reference import Reference, balanced_labels, measure_reference
from .storage import BUNDLED, load_classifier, save_classifier
from .training import augment, crop, train_classifier

__all__ = [
    "BUNDLED",
    "Classifier",
    "Reference",
    "augment",
    "balanced_labels",
    "classify",
    "crop",
    "load_classifier",
    "measure_reference",
    "save_classifier",
    "train_classifier",
]
