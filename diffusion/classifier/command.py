"""Train a classifier of labelled images, and measure real images in its features."""

import argparse
import time
from pathlib import Path

import torch

from ..data import NAMED_SETS, ImageSet, load_dataset
from ..storage.atomic import check_writable
from ..utils.validation import choice, whole_number
from ..utils.words import counted
from .network import ARCHITECTURES, ClassifierConfig
from .reference import draw_samples, measure_reference
from .storage import save_classifier, stored
from .training import train_classifier

TEST_SHARE = 10  # one image of ten of each class is a test image where none are given
SAMPLE_SIZE = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", default="mnist", help=f"{', '.join(NAMED_SETS)}, or a folder or zip (default: mnist)")
    add(
        "--test-data",
        help=f"folder or zip of test images (default: the test split of {' or '.join(NAMED_SETS)}; of a "
        f"folder or zip, one image of {TEST_SHARE} of each class, which is not trained on)",
    )
    add(
        "--data-dir",
        help=f"torchvision's folder of {' or '.join(NAMED_SETS)}: DIR, if the files are in DIR/MNIST/raw",
    )
    add(
        "--resize",
        type=int,
        metavar="SIZE",
        help="crop each image of a folder or zip to a central square, scaled to SIZE x SIZE pixels",
    )
    add("--out", required=True, help="folder to write")
    add(
        "--architecture",
        help=f"{' or '.join(ARCHITECTURES)} (default: plain for gray images, residual for colour)",
    )
    add("--epochs", type=int, help="passes over the training images (default: 18 for plain, 10 for residual)")
    add("--width", type=int, help="channels of the first layers (default: 16; 48 for plain in colour)")
    add(
        "--features",
        type=int,
        help="size of the feature vector (default: 64 for plain, 128 in colour; 256 for residual)",
    )
    add(
        "--sample-size",
        type=int,
        help="number of real test images in each sample that is measured, as many of each class (default: "
        f"{SAMPLE_SIZE}, or all that there are)",
    )


def run(options: argparse.Namespace) -> None:
    check_writable(Path(options.out) / "config.json")
    for name, most in (("epochs", 10**6), ("width", 65536), ("features", 65536)):
        if getattr(options, name) is not None:
            whole_number(f"--{name}", getattr(options, name), 1, most)
    if options.architecture is not None:
        choice("architecture", options.architecture, ARCHITECTURES)
    train, test = _load(options)
    channels, height, width = train.images.shape[1:]
    if height != width:
        raise ValueError(
            f"the classifier takes square images, not {width} x {height}; add --resize SIZE, which makes them"
        )
    classes = int(train.known_labels().max()) + 1
    config = _config(options, channels, height, classes)
    if options.epochs is None:
        options.epochs = 18 if config.architecture == "plain" else 10
    size = options.sample_size
    if size is None:
        size = min(SAMPLE_SIZE, classes * int(torch.bincount(test.known_labels(), minlength=classes).min()))
    draw_samples(test, classes, size)  # fails now rather than after the training
    print(
        f"{train.name}: {counted(len(train.images), 'image')} to train on, {len(test.images):,} to test with",
        flush=True,
    )
    start = time.monotonic()
    classifier = train_classifier(
        train.images,
        train.known_labels(),
        config=config,
        flip=channels == 3,
        epochs=options.epochs,
        progress=True,
    )
    training = {
        "command": "python -m diffusion.classifier",
        "parameters": config.num_parameters,
        "data": f"{Path(train.name).resolve().name}: {counted(len(train.images), 'training image')}",
        "epochs": options.epochs,
        "seconds": round(time.monotonic() - start),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    classifier.load_state_dict(stored(classifier))  # measured as stored, in half precision
    reference = measure_reference(classifier, train, test, size)
    save_classifier(options.out, classifier, reference, training)
    print(f"{options.out}: {reference.test_accuracy:.2%} of the test images ({reference.source})")


def _config(options: argparse.Namespace, channels: int, size: int, classes: int) -> ClassifierConfig:
    """The configuration that the options give, with defaults for gray digits and for small photographs."""
    gray = channels == 1
    architecture = options.architecture or ("plain" if gray else "residual")
    plain = architecture == "plain"
    width = options.width if options.width is not None else 48 if plain and not gray else 16
    features = options.features if options.features is not None else (64 if gray else 128) if plain else 256
    return ClassifierConfig(channels, size, classes, width, features, architecture)


def _load(options: argparse.Namespace) -> tuple[ImageSet, ImageSet]:
    """The training images and the test images, both labelled with the same classes."""
    if options.data in NAMED_SETS:
        for name in ("resize", "test_data"):
            if getattr(options, name) is not None:
                option = name.replace("_", "-")
                raise ValueError(f"--{option} is for a folder or zip of images, and --data is {options.data}")
        splits = [
            load_dataset(options.data, split=split, data_dir=options.data_dir) for split in ("train", "test")
        ]
        return splits[0], splits[1]
    if options.data_dir is not None:
        raise ValueError(f"--data-dir is for {' and '.join(NAMED_SETS)}, and --data is {options.data}")
    train = load_dataset(options.data, size=options.resize, progress=True)
    train.known_labels()  # ValueError without labels
    if options.test_data is None:
        return hold_out(train)
    channels = train.images.shape[1]
    test = load_dataset(options.test_data, channels=channels, size=options.resize, progress=True)
    test.known_labels()
    if train.images.shape[1:] != test.images.shape[1:] or train.classes != test.classes:
        raise ValueError(f"{train.name} and {test.name} differ in their images' size or in classes")
    return train, test


def hold_out(data: ImageSet, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """The images to train on, and those to test with: one of TEST_SHARE of each class, at least one.

    Both are in the order of the data. ValueError for a class of one image.
    """
    labels = data.known_labels()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed), device="cpu")
    held_out = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for label in range(int(labels.max()) + 1):
        own = order[labels[order] == label]
        if len(own) < 2:
            name = data.classes[label] if data.classes else label
            raise ValueError(
                f"the class {name} of {data.name} has {counted(len(own), 'image')}, and "
                "needs two, of which one is a test image; or give --test-data"
            )
        held_out[own[: max(1, len(own) // TEST_SHARE)]] = True
    train, test = (
        data._replace(images=data.images[chosen], labels=labels[chosen]) for chosen in (~held_out, held_out)
    )
    return train, test
