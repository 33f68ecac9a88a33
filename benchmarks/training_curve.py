"""The loss of training runs against images and FLOP:
python -m benchmarks.training_curve RUN [RUN ...] --out NAME.png.

Each run's log.csv gives the mean loss of the steps since the row before, and the validation loss of its
averaged weights. The images are those of the run, without those of a model that it started from. The FLOP are
three evaluations of the network for each image: the forward pass, and the gradients of its inputs and of its
weights. NAME.csv beside the picture holds the points.
"""

import argparse
import csv
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import diffusion
from diffusion.storage.atomic import check_writable, replacing
from diffusion.training.fine_tuning import images_seen
from diffusion.training.log_file import read_rows
from diffusion.utils.validation import whole_number

from .flops import flops_of_unet


class Point(NamedTuple):
    """A row of a log. images: seen so far. pflop: spent on them. Losses are None where the row has none."""

    run: str
    step: int
    images: int
    pflop: float
    loss: float | None
    validation_loss: float | None


def read_points(run: Path) -> list[Point]:
    """The points of a run's folder.

    ValueError if it lacks a log, or if its model does not tell the images of a step.
    """
    model = diffusion.load(run)
    try:
        about = model.metadata["training"]
        step, size = (whole_number(name, about[name], 0) for name in ("step", "batch_size"))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"{run} is no run of `diffusion train`: its config.json has no step and batch_size"
        ) from None
    seen = images_seen(model)
    if seen is None or seen.own != step * size:
        raise ValueError(f"{run} changed its batch size, so its log does not tell the images of a step")
    flop, points = 3 * flops_of_unet(model.unet), []
    for step, line in read_rows(run / "log.csv"):
        try:
            loss, validation = (float(text) if text else None for text in line.split(",")[1:3])
        except ValueError as error:
            raise ValueError(f"{run / 'log.csv'} is damaged in the row of step {step}: {error}") from error
        points.append(Point(run.name, step, step * size, flop * step * size / 1e15, loss, validation))
    return points


def draw(runs: Sequence[list[Point]], picture: Path) -> None:
    """Draws the losses of runs against images and against PFLOP, and writes the points beside them as CSV."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, points in enumerate(runs):
        for axes, x in ((left, "images"), (right, "pflop")):
            for y, style in (("loss", {"alpha": 0.4}), ("validation_loss", {"marker": "o", "markersize": 4})):
                known = [point for point in points if getattr(point, y) is not None]
                label = f"{points[0].run}, {y.replace('_', ' ')}" if known else None
                values = [[getattr(point, name) for point in known] for name in (x, y)]
                axes.plot(*values, color=f"C{number}", label=label, **style)
    left.set(xlabel="images seen", ylabel="loss", yscale="log")
    right.set(xlabel="PFLOP of training")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(which="both", alpha=0.3)
    right.legend(fontsize=8)
    with replacing(picture, picture.with_suffix(".csv")) as (as_png, as_csv):
        figure.savefig(as_png, format="png", dpi=100)
        with as_csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Point._fields)
            for point in itertools.chain(*runs):
                writer.writerow(point._replace(pflop=f"{point.pflop:.6g}"))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_curve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of `diffusion train`")
    parser.add_argument("--out", type=Path, required=True, metavar="NAME.png", help="picture to write")
    args = parser.parse_args(arguments)
    try:
        if args.out.suffix != ".png":
            raise ValueError(f"--out must end in .png: {args.out}")
        check_writable(args.out, args.out.with_suffix(".csv"))
        runs = [read_points(run) for run in args.runs]
        if not all(runs):
            raise ValueError(f"{args.runs[runs.index([])] / 'log.csv'} has no rows yet")
        draw(runs, args.out)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
