"""The samples of a model at several moments of its training:
python -m benchmarks.snapshots MODEL [MODEL ...] --out NAME.png.

Each MODEL is a folder of averaged weights that `diffusion train` wrote, kept from a moment of a run, or the
name of a bundled model. Its class accuracy with guidance, and the Fréchet distance of its unguided samples,
are those of `diffusion evaluate` with the same options. NAME.csv beside the picture holds the points;
weights that are there already are not measured again, and all points have one protocol.
"""

import argparse
import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import diffusion
from diffusion.classifier import classifier_of, load_classifier
from diffusion.evaluation.accuracy import evaluate
from diffusion.evaluation.protocol import image_shape
from diffusion.storage.atomic import check_writable, replacing
from diffusion.storage.reading import add_tensors, sha256
from diffusion.training.fine_tuning import images_seen
from diffusion.utils.validation import number, whole_number


class Point(NamedTuple):
    """images: seen by then, with those of a model that the run started from. accuracy: share of guided
    samples that the classifier reads as the class asked for. distance: of unguided samples from the training
    set; real: of as many test images. weights: first digits of their SHA-256. protocol: of the samples.
    """

    images: int
    accuracy: float
    distance: float
    real: float
    weights: str
    protocol: str


def known_images(model: diffusion.DDPM) -> int:
    """Images that a model was trained on; ValueError if its config.json does not say it."""
    seen = images_seen(model)
    if seen is None:
        raise ValueError("it is no model of `diffusion train`: its config.json has no step and batch_size")
    return seen.total


def digest_of_weights(model: diffusion.DDPM) -> str:
    digest = hashlib.sha256()
    add_tensors(digest, model.unet.state_dict())
    return digest.hexdigest()[:16]


def protocol_of(args: argparse.Namespace, classifier: Path) -> str:
    """The options of the samples, and the classifier in a folder, in one line."""
    samples = f"{args.num} samples, guidance {args.guidance_scale:g}, {args.sampler}, {args.steps} steps"
    return f"{samples}, {args.precision}, classifier {sha256(classifier / 'model.safetensors')[:16]}"


def measure(model: diffusion.DDPM, args: argparse.Namespace, points: list[Point]) -> Point | None:
    """A model's point; None if it is among the points. ValueError if these have another protocol."""
    classifier = args.classifier or classifier_of(image_shape(model))
    network, reference = load_classifier(classifier)
    if args.num != reference.sample_size:
        wanted = reference.sample_size
        raise ValueError(f"--num must be {wanted}, as many as the real images of {classifier}")
    images, weights = known_images(model), digest_of_weights(model)
    protocol = protocol_of(args, network.folder)
    for point in points:
        if point.protocol != protocol:
            table = args.out.with_suffix(".csv")
            raise ValueError(f"{table} holds points of another protocol: {point.protocol}; not {protocol}")
    if any(point.weights == weights for point in points):
        return None
    result = evaluate(
        model,
        num=args.num,
        guidance_scale=args.guidance_scale,
        classifier=classifier,
        sampler=args.sampler,
        steps=args.steps,
        precision=args.precision,
        progress=True,
    )
    accuracy, distances = result["class_accuracy"], result["frechet"]
    if accuracy is None:
        raise ValueError("it knows no classes")
    real = distances["real"]["balanced"]["distance"]
    return Point(images, accuracy["accuracy"], distances["distance"], real, weights, protocol)


def read_points(path: Path) -> list[Point]:
    """The points of a CSV; none where there is no file. ValueError if it is damaged."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        points = []
        for row in rows:
            images = whole_number("images", int(row["images"]), 0)
            values = (number(name, float(row[name]), 0) for name in ("accuracy", "distance", "real"))
            points.append(Point(images, *values, str(row["weights"]), str(row["protocol"])))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of this command: {error!r}") from error
    return points


def draw(points: Sequence[Point], picture: Path) -> None:
    """Draws both curves against the images seen, and writes the points beside them as CSV."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    images = [point.images for point in points]
    left.plot(images, [100 * point.accuracy for point in points], marker="o")
    left.set(xlabel="images seen", ylabel="% read as the class asked for", ylim=(0, 100))
    right.plot(images, [point.distance for point in points], marker="o", label="samples, without guidance")
    right.plot(images, [point.real for point in points], "--", color="gray", label="real test images")
    right.set(xlabel="images seen", ylabel="Fréchet distance", yscale="log")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_minor_formatter("{x:g}")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(which="both", alpha=0.3)
    with replacing(picture, picture.with_suffix(".csv")) as (as_png, as_csv):
        figure.savefig(as_png, format="png", dpi=100)
        with as_csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows([Point._fields, *points])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.snapshots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="folder of averaged weights, or a bundled model")
    add("--out", type=Path, required=True, metavar="NAME.png", help="picture to write")
    add("--num", type=int, default=1000, help="samples for each measure (default: %(default)s)")
    add("--classifier", help="as of `diffusion evaluate` (default: the bundled one of the model's images)")
    add("--guidance-scale", type=float, default=2.0, help="of the class accuracy (default: %(default)s)")
    add("--sampler", default="dpm++", help="default: %(default)s")
    add("--steps", type=int, default=30, help="default: %(default)s")
    add("--precision", default="exact", help="exact or fast (default: %(default)s)")
    args = parser.parse_args(arguments)
    folder: str | None = None
    try:
        if args.out.suffix != ".png":
            raise ValueError(f"--out must end in .png: {args.out}")
        check_writable(args.out, args.out.with_suffix(".csv"))
        points = read_points(args.out.with_suffix(".csv"))
        for folder in args.models:
            point = measure(diffusion.load(folder), args, points)
            if point is None:
                print(f"{folder}: measured before", flush=True)
                continue
            points = sorted([*points, point])
            draw(points, args.out)
            print(f"{folder}: {point}", flush=True)
        folder = None
        if not points:
            raise ValueError("there is no MODEL to measure")
        draw(points, args.out)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {'' if folder is None else f'{folder}: '}{error}\n")


if __name__ == "__main__":
    main()
