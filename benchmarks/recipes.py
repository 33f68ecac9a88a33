"""Training runs compared at equal cost: python -m benchmarks.recipes RUN [RUN ...] --data TEST.zip
--reference TRAIN.zip --features FOLDER.

Each run's averaged model, and each further average in its `ema-*/`, is judged by two measures that know
nothing of its schedule, prediction type or loss weights. One is the mean squared error of its predictions for
held-out images at fixed noise levels ln(sigma / alpha), with the same noise for all models and the images'
labels given. The other is the Fréchet distance of unguided samples, in the features of a classifier. Beside
them stand the images that the run has seen, without those of a model that it started from, its seconds, and
the work of one evaluation of its network.
"""

import argparse
import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

import diffusion
from diffusion.classifier import balanced_labels
from diffusion.data import ImageSet, load_dataset
from diffusion.evaluation.features import Features, load_features
from diffusion.evaluation.protocol import ema_decay
from diffusion.process.prediction import x0_coefficients
from diffusion.storage.atomic import check_writable, replacing
from diffusion.storage.images import to_float, to_uint8
from diffusion.training.fine_tuning import images_seen
from diffusion.utils.device import multiplies_bfloat16
from diffusion.utils.frechet import frechet_distance, moments
from diffusion.utils.validation import number

from .flops import flops_of_unet

LEVELS = (-4.0, -3.3, -2.6, -1.9, -1.2, -0.5, 0.2, 0.9, 1.6, 2.3, 3.0)  # values of ln(sigma / alpha)
BATCH = 50
Moments = tuple[torch.Tensor, torch.Tensor]  # mean and covariance of features


def timestep_at(schedule: diffusion.NoiseSchedule, level: float) -> float | None:
    """The timestep, with its fraction, where ln(sigma / alpha) is `level`; None if the schedule lacks it."""
    levels = 0.5 * torch.log((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    levels = levels[levels.isfinite()]  # but the last of a zero terminal SNR
    if not levels[0] <= level <= levels[-1]:
        return None
    after = max(int(torch.searchsorted(levels, level)), 1)
    low, high = levels[after - 1].item(), levels[after].item()
    return after - 1 + (level - low) / (high - low)


@torch.no_grad()
def held_out_errors(
    model: diffusion.DDPM, images: torch.Tensor, labels: torch.Tensor | None, seed: int = 0
) -> list[dict[str, float | None]]:
    """At each of LEVELS, the mean squared errors of x0 and of v = alpha eps - sigma x0, as a model sees them.

    images: uint8 [N, C, H, W]. labels: int64 [N], given to a model that knows classes. The noise of image i
    at level k is a function of seed, i and k alone. Errors are None where the schedule lacks the level.
    """
    rows = []
    half = multiplies_bfloat16(torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
        for index, level in enumerate(LEVELS):
            t = timestep_at(model.schedule, level)
            if t is None:
                rows.append({"level": level, "x0": None, "v": None})
                continue
            signal = torch.special.expit(torch.tensor(-2 * level, dtype=torch.float64))
            alpha, sigma = signal.sqrt().item(), (1 - signal).sqrt().item()
            x0_from_x, x0_from_output = (
                value.item() for value in x0_coefficients(model.prediction_type, signal)
            )
            total = 0.0
            for start in range(0, len(images), BATCH):
                x0 = to_float(images[start : start + BATCH])
                ids = torch.arange(start, start + len(x0))
                noise = diffusion.kernels.philox_normal(x0.shape, seed=seed, sample_ids=ids, stream=index)
                x = alpha * x0 + sigma * noise
                given = labels[start : start + BATCH] if labels is not None and model.num_classes else None
                output = model.unet(x, torch.full((len(x),), t), given).float()[:, : x.shape[1]]
                total += (
                    (x0_from_x * x + x0_from_output * output - x0)
                    .square()
                    .flatten(1)
                    .mean(1)
                    .double()
                    .sum()
                    .item()
                )
            error = total / len(images)
            rows.append({"level": level, "x0": error, "v": error / sigma**2})
    return rows


def distance_of_samples(
    model: diffusion.DDPM,
    features: Features,
    reference: tuple[torch.Tensor, torch.Tensor],
    num: int,
    **options,
) -> float:
    """Fréchet distance of `num` unguided samples, of each class in turn, from moments in these features."""
    asked = {"num_samples": num}
    if model.num_classes is not None:
        asked = {"labels": balanced_labels(num, model.num_classes).tolist()}
    x = model.sample(**asked, guidance_scale=1.0, **options)
    return frechet_distance(*moments(features.of(to_uint8(x.cpu()))[0]), *reference)


def judge(
    run: Path, data: ImageSet, features: Features | None, reference: Moments | None, num: int, **options
) -> list[dict]:
    """One row for each average of a run; the distance is left out without features."""
    rows = []
    for folder in [run, *sorted(run.glob("ema-*"))]:
        model = diffusion.load(folder).eval()
        config = model.unet.config
        if data.images.shape[1:] != (config.in_channels, *config.image_shape):
            raise ValueError(f"{folder} makes other images than {data.name}, {list(data.images.shape[1:])}")
        seen, about = images_seen(model), model.metadata.get("training")
        about = about if isinstance(about, dict) else {}
        gflop = flops_of_unet(model.unet) / 1e9
        errors = held_out_errors(model, data.images, data.labels)
        known = [row["v"] for row in errors if row["v"] is not None]
        row = {
            "run": run.name,
            "ema_decay": ema_decay(model),
            "images_seen": None if seen is None else seen.own,
            "seconds": _number(about.get("seconds")),
            "gflop_per_image": gflop,
            "training_pflop": None if seen is None else 3 * gflop * seen.own / 1e6,
            "parameters": sum(parameter.numel() for parameter in model.unet.parameters()),
            "errors": errors,
            "mean_v_error": math.fsum(known) / len(known) if len(known) == len(errors) else None,
        }
        if features is not None:
            row["distance"] = distance_of_samples(model, features, reference, num, **options)
        rows.append(row)
    return rows


def _number(value: object) -> float | None:
    """A finite number of a model's metadata; None for anything else."""
    try:
        return number("it", value)
    except ValueError:
        return None


def markdown(rows: list[dict], name: str) -> str:
    """Two tables: the cost and quality of each average, and its errors in v by noise level."""

    def line(cells) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:,.{digits}f}"

    head = ["run", "EMA", "images", "seconds", "GFLOP/image", "PFLOP", "v error", f"distance in {name}"]
    lines = [line(head), line(["---"] * len(head))]
    for row in rows:
        numbers = [("images_seen", 0), ("seconds", 0), ("gflop_per_image", 3), ("training_pflop", 3)]
        numbers += [("mean_v_error", 4), ("distance", 2)]
        cells = [cell(row.get(key), digits) for key, digits in numbers]
        lines.append(line([row["run"], str(row["ema_decay"] or ""), *cells]))
    head = ["v error at ln(sigma / alpha)", "EMA", *(f"{level:g}" for level in LEVELS)]
    lines += ["", line(head), line(["---"] * len(head))]
    for row in rows:
        cells = [cell(error["v"], 4) for error in row["errors"]]
        lines.append(line([row["run"], str(row["ema_decay"] or ""), *cells]))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="folder of `diffusion train`")
    add("--data", required=True, help="held-out images: a folder or zip, with a folder for each class")
    add(
        "--images",
        type=int,
        default=1000,
        help="number of held-out images for the errors (default: %(default)s)",
    )
    add("--reference", required=True, help="images that samples are compared with: a folder or zip")
    add("--features", required=True, help="--features of `diffusion evaluate`, such as a classifier's folder")
    add("--num", type=int, default=1000, help="samples of each model; 0: no distance (default: %(default)s)")
    add("--sampler", default="dpm++", help="(default: %(default)s)")
    add("--steps", type=int, default=20, help="(default: %(default)s)")
    add("--cache", help="folder of decoded images, --cache of `diffusion train`")
    add("--json", type=Path, metavar="FILE", help="also write the rows to this file")
    args = parser.parse_args(arguments)
    try:
        if args.json:
            check_writable(args.json)
        if args.images < 1 or args.num < 0 or args.num == 1:
            raise ValueError("--images must be at least 1, and --num at least 2, or 0 for no distance")
        data = load_dataset(args.data, cache=args.cache, progress=True)
        chosen = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[: args.images]
        labels = None if data.labels is None else data.labels[chosen]
        data = ImageSet(data.images[chosen], labels, data.classes, data.name)
        features = reference = None
        if args.num:
            features = load_features(args.features)
            theirs = load_dataset(args.reference, cache=args.cache, progress=True)
            reference = moments(features.of(theirs.images, progress=True)[0])
        rows = []
        options = {"sampler": args.sampler, "steps": args.steps, "seed": 0, "precision": "fast"}
        for run in tqdm(args.runs, unit=" runs"):
            rows += judge(run, data, features, reference, args.num, **options)
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    protocol = {
        "errors": f"mean squared, {len(data.images)} images of {data.name}, seed 0",
        "mean_v_error": f"over ln(sigma / alpha) of {', '.join(f'{level:g}' for level in LEVELS)}",
        "distance": f"Fréchet, {args.num} samples, unguided, {args.sampler}, {args.steps} steps, fast",
        "reference": args.reference,
        "features": None if features is None else {"name": features.name, "sha256": features.sha256},
        "training_pflop": "3 evaluations an image: forward, and the gradients of inputs and weights",
        "seconds": "as the run reports them, with whatever else the machine had to do",
        "torch": torch.__version__,
    }
    print(markdown(rows, "no features" if features is None else features.name))
    if args.json:
        with replacing(args.json) as (temporary,):
            temporary.write_text(json.dumps({"protocol": protocol, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
