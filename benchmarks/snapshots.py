"""The samples of a model at several moments of its training:
python -m benchmarks.snapshots MODEL [MODEL ...] --out NAME.png.

Each MODEL is a folder of averaged weights that `diffusion train` wrote, kept from a moment of a run. Its
class accuracy with guidance, and the Fréchet distance of its unguided samples, are those of `diffusion
evaluate`. NAME.csv beside the picture holds the points; a moment that is there already is not measured again.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import diffusion
from diffusion.classifier import classifier_of, load_classifier
from diffusion.evaluation.accuracy import evaluate
from diffusion.evaluation.protocol import image_shape
from diffusion.storage.atomic import check_writable, replacing
from diffusion.training.fine_tuning import images_seen


class Point(NamedTuple):
    """images: seen by then. accuracy: share of guided samples that the classifier reads as the class asked
    for. distance: of unguided samples from the training set; real: of as many test images."""

    images: int
    accuracy: float
    distance: float
    real: float


def known_images(model: diffusion.DDPM) -> int:
    """Images that a model was trained on; ValueError if its config.json does not say it."""
    seen = images_seen(model)
    if seen is None:
        raise ValueError("it is no model of `diffusion train`: its config.json has no step and batch_size")
    return seen


def measure(model: diffusion.DDPM, args: argparse.Namespace) -> Point:
    classifier = args.classifier or classifier_of(image_shape(model))
    drawn = load_classifier(classifier)[1].sample_size
    if args.num != drawn:
        raise ValueError(f"--num must be {drawn}, as many as the real images of {classifier}")
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
    return Point(
        known_images(model),
        accuracy["accuracy"],
        distances["distance"],
        distances["real"]["balanced"]["distance"],
    )


def read_points(path: Path) -> dict[int, Point]:
    """The points of a CSV, by the images seen; none where there is no file. ValueError if it is damaged."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        points = [
            Point(int(row["images"]), *(float(row[name]) for name in Point._fields[1:])) for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of this command: {error!r}") from error
    return {point.images: point for point in points}


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
    add("models", nargs="*", type=Path, metavar="MODEL", help="folder of averaged weights")
    add("--out", type=Path, required=True, metavar="NAME.png", help="picture to write")
    add("--num", type=int, default=1000, help="samples for each measure (default: %(default)s)")
    add("--classifier", help="as of `diffusion evaluate` (default: the bundled one of the model's images)")
    add("--guidance-scale", type=float, default=2.0, help="of the class accuracy (default: %(default)s)")
    add("--sampler", default="dpm++", help="default: %(default)s")
    add("--steps", type=int, default=30, help="default: %(default)s")
    add("--precision", default="exact", help="exact or fast (default: %(default)s)")
    args = parser.parse_args(arguments)
    folder: Path | None = None
    try:
        if args.out.suffix != ".png":
            raise ValueError(f"--out must end in .png: {args.out}")
        check_writable(args.out, args.out.with_suffix(".csv"))
        points = read_points(args.out.with_suffix(".csv"))
        for folder in args.models:
            model = diffusion.load(folder)
            if known_images(model) in points:
                continue
            point = measure(model, args)
            points[point.images] = point
            draw([points[images] for images in sorted(points)], args.out)
            print(f"{folder}: {point}", flush=True)
        folder = None
        if not points:
            raise ValueError("there is no MODEL to measure")
        draw([points[images] for images in sorted(points)], args.out)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {'' if folder is None else f'{folder}: '}{error}\n")


if __name__ == "__main__":
    main()
