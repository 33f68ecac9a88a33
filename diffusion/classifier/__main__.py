"""The command that trains a classifier: python -m diffusion.classifier."""

import argparse
import time
from pathlib import Path

import torch

from ..cli import Parser, escape_unencodable_names
from ..data import NAMED_SETS, ImageSet, load_dataset
from ..storage.atomic import check_writable
from .network import ARCHITECTURES, ClassifierConfig
from .reference import draw_samples, measure_reference
from .storage import save_classifier, stored
from .training import train_classifier


def main(arguments: list[str] | None = None) -> None:
    """Train a classifier of labelled images, and measure real images in its features."""
    escape_unencodable_names()
    parser = Parser(prog="python -m diffusion.classifier", description=main.__doc__)
    add = parser.add_argument
    add("--data", default="mnist", help=f"{', '.join(NAMED_SETS)}, or a folder or zip (default: mnist)")
    add("--test-data", help="folder or zip of test images; needed unless --data is a data set")
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
    add("--sample-size", type=int, default=1000, help="number of real test images to measure (default: 1000)")
    options = parser.parse_args(arguments)
    try:
        check_writable(Path(options.out) / "config.json")
        train, test = _load(options)
        channels, height, width = train.images.shape[1:]
        if height != width:
            raise ValueError(f"the classifier takes square images, not {height} x {width}")
        classes = int(train.known_labels().max()) + 1
        config = _config(options, channels, height, classes)
        if options.epochs is None:
            options.epochs = 18 if config.architecture == "plain" else 10
        draw_samples(test, classes, options.sample_size)  # fails now rather than after the training
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
            "data": f"{train.name}: {len(train.images):,} training images",
            "epochs": options.epochs,
            "seconds": round(time.monotonic() - start),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        classifier.load_state_dict(stored(classifier))  # measured as stored, in half precision
        reference = measure_reference(classifier, train, test, options.sample_size)
        save_classifier(options.out, classifier, reference, training)
    except ValueError as error:
        parser.error(str(error))
    print(f"{options.out}: {reference.test_accuracy:.2%} of the test images ({reference.source})")


def _config(options: argparse.Namespace, channels: int, size: int, classes: int) -> ClassifierConfig:
    """The configuration that the options give, with defaults for gray digits and for small photographs."""
    gray = channels == 1
    architecture = options.architecture or ("plain" if gray else "residual")
    plain = architecture == "plain"
    width = options.width if options.width is not None else 48 if plain and not gray else 16
    features = options.features if options.features is not None else (64 if gray else 128) if plain else 256
    return ClassifierConfig(channels, size, classes, width, features, architecture)


def _load(options: argparse.Namespace) -> list[ImageSet]:
    """The training images and the test images, both labelled with the same classes."""
    if options.data in NAMED_SETS and options.resize is not None:
        raise ValueError(f"--resize is for a folder or zip of images, and --data is {options.data}")
    if options.data in NAMED_SETS:
        sets = [
            load_dataset(options.data, split=split, data_dir=options.data_dir) for split in ("train", "test")
        ]
    elif options.test_data is None:
        raise ValueError("--test-data is missing: images to test with, which are not trained on")
    else:
        train = load_dataset(options.data, size=options.resize, progress=True)
        channels = train.images.shape[1]
        sets = [
            train,
            load_dataset(options.test_data, channels=channels, size=options.resize, progress=True),
        ]
    for images in sets:
        images.known_labels()  # ValueError without labels
    if sets[0].images.shape[1:] != sets[1].images.shape[1:] or sets[0].classes != sets[1].classes:
        raise ValueError(f"{sets[0].name} and {sets[1].name} differ in their images' size or in classes")
    return sets


if __name__ == "__main__":
    main()
