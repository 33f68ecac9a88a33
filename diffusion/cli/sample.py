"""Sample images into a grid (.png, .jpg, .webp), an animation of the process (.gif), .npz, or a folder."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch

from ..ddpm import DDPM, load
from ..evaluation.shards import report, sample_shards
from ..inference.batches import Interrupted
from ..samplers import FULL_CHAIN, SAMPLERS, options_of, own_options
from ..samplers.timesteps import SPACINGS, STRIDES
from ..storage.atomic import check_writable
from ..storage.images import PICTURES, check_grid, save_gif, save_grid, save_npz, to_uint8
from ..utils.ranks import current_ranks
from ..utils.words import counted
from .options import (
    DEFAULT_SAMPLER,
    add_computation_options,
    add_sampler_options,
    choose_device,
    choose_guidance,
    choose_labels,
    choose_sampler,
)
from .own_images import (
    add_start_options,
    check_samples,
    check_start_options,
    interpolated,
    inversion,
    save_interpolated,
    start_arguments,
    steps_taken,
)

GIF_FRAMES = 50  # largest number of frames, spread evenly over the steps
ROW = 10  # images of a row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="mnist", help="a bundled name, a folder, or hf:owner/name (default: %(default)s)")
    add(
        "--labels",
        nargs="+",
        action="extend",
        metavar="LABEL",
        help="class labels, such as 0-9, 3 1 4, cat dog, or none (default: all)",
    )
    add("--num", type=int, help="number of images; the labels repeat in turn (default: 4 for each class)")
    add(
        "--guidance-scale",
        type=float,
        help="scale of classifier-free guidance; 1: no guidance (default: the model's, or 2 with labels)",
    )
    add(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="timesteps that are guided (default: all)",
    )
    add(
        "--guidance-rescale",
        type=float,
        metavar="PHI",
        help="rescaling after guidance, 0 to 1 (default: the model's, or 0)",
    )
    add(
        "--guidance-parallel",
        type=float,
        metavar="SHARE",
        help="share of the guidance that is parallel to the prediction with labels, 0 to 1 (default: the "
        "model's, or 1)",
    )
    add("--sampler", help=f"{', '.join(SAMPLERS)} (default: the model's, or {DEFAULT_SAMPLER['sampler']})")
    add(
        "--steps",
        type=int,
        help="number of steps, 1 to T (default: the model's for its own sampler; "
        f"{DEFAULT_SAMPLER['steps']} for others; T for {', '.join(FULL_CHAIN)})",
    )
    add(
        "--spacing",
        help=f"spacing of the timesteps: {', '.join((*SPACINGS, *STRIDES))} (default: the model's)",
    )
    add_sampler_options(parser)
    add(
        "--dynamic-threshold",
        type=float,
        metavar="RATIO",
        help="clip to this quantile of each image, such as 0.995",
    )
    add("--dynamic-threshold-max", type=float, metavar="LIMIT", help="largest such quantile (default: inf)")
    add("--clip", type=float, metavar="LIMIT", help="clip x_0 to [-LIMIT, LIMIT] (default: the model's)")
    add_start_options(parser)
    add("--seed", type=int, default=0, help="image k of a seed is always the same (default: 0)")
    add_computation_options(parser)
    add(
        "--out",
        default="samples.png",
        help="a .png, .jpg, .webp, .gif or .npz file, or a folder for .npz shards (default: %(default)s)",
    )
    add(
        "--shard-size",
        type=int,
        default=500,
        help="number of images in each .npz of a folder (default: %(default)s)",
    )
    add("--columns", type=int, help="number of images in a row of the grid (default: 10)")
    add(
        "--scale",
        type=int,
        default=2,
        help="width of an image's pixel in the grid, in pixels (default: %(default)s)",
    )
    add("--captions", action="store_true", help="write the name or number of its class below each image")
    add(
        "--x0",
        action="store_true",
        help="show the images that the steps predict: the frames of a .gif, or in a picture a row for each "
        f"image, of --columns steps (default: {ROW})",
    )


def run(args: argparse.Namespace) -> None:
    out, ranks = Path(args.out), current_ranks()
    sharded = is_folder(args.out)
    suffix = out.suffix.lower()
    if not sharded and suffix not in (*PICTURES, ".gif", ".npz"):
        endings = f"{', '.join(PICTURES)}, .gif or .npz"
        raise ValueError(f"cannot tell the format of {out}; end its name in {endings}, or in /")
    if not sharded and ranks.world_size > 1:
        raise ValueError(f"{ranks.world_size} ranks write into a folder; end the name {out} in /")
    check_start_options(args, suffix, sharded)
    check_writable(out / "run.json" if sharded else out)
    model = load(args.model, choose_device(args.device, ranks))
    start = start_arguments(args, model)
    if start:
        args.labels = args.labels or args.invert or ["none"]
    labels, num = choose_labels(model, args.labels, args.num)
    if start and args.num is None:
        num = max(len(start["image"]), len(labels or []))
        labels = labels and [labels[i % len(labels)] for i in range(num)]
    if args.invert is not None:
        args.sampler = "ddim"
        args.guidance_scale = 1.0 if args.guidance_scale is None else args.guidance_scale
    if not sharded and suffix != ".npz":
        count, columns = num, args.columns
        if args.x0 and suffix != ".gif":
            columns = ROW if columns is None else columns
            count = model.check_count(num * columns, "--num times --columns")
        if args.interpolate is not None:
            all_frames = model.check_count(num * args.interpolate, "--num times --interpolate")
            if suffix != ".gif":
                count, columns = all_frames, args.interpolate
        config = model.unet.config
        check_grid((count, config.in_channels, *config.image_shape), columns, scale=args.scale)
    captions = _captions(model, labels) if args.captions else None
    if captions is not None and (sharded or suffix not in PICTURES):
        raise ValueError(f"--captions is for a grid ({', '.join(PICTURES)}), and --out is {out}")
    guidance = choose_guidance(model, args.guidance_scale, labels is not None)
    sampler, steps = choose_sampler(model, args.sampler, args.steps)
    names = ("spacing", *own_options(), "guidance_interval", "clip")
    names += ("guidance_parallel", "dynamic_threshold", "dynamic_threshold_max")
    rescale = args.guidance_rescale
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    options |= {
        "guidance_scale": guidance,
        "guidance_rescale": model.guidance_rescale if rescale is None else rescale,
        "sampler": sampler,
        "steps": steps,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "backend": args.backend,
        "precision": args.precision,
        "dtype": args.dtype,
    }
    began = time.perf_counter()
    if args.interpolate is not None:
        del options["seed"]
        x = interpolated(model, labels, num, args.interpolate, args.seed, options)
        save_interpolated(x, out, model, args.columns, args.scale)
        print(
            f"{out}: {counted(len(x), 'frame')} of {counted(num, 'image')} in "
            f"{time.perf_counter() - began:.1f} s"
        )
        return
    if sharded:
        done = sample_shards(
            model, out, num, labels, shard_size=args.shard_size, ranks=ranks, progress=True, **options
        )
        print("\n".join(report(out, done, ranks)))
        return
    if args.invert is not None:
        check_samples(model, labels, num, options)
        start = inversion(args, model, start["image"], num, options)
    chosen = options | {"strength": start["strength"]} if "strength" in start else options
    layout: dict[str, Any]
    frames = None
    if suffix == ".gif" or args.x0:
        most = GIF_FRAMES if suffix == ".gif" else args.columns or ROW
        frames = _Frames(_evaluations(model, chosen), most, args.x0)
    interrupted = None
    try:
        images = model.sample(
            labels,
            num_samples=num,
            progress=True,
            callback=frames,
            **start,
            **options,
        )
    except Interrupted as error:
        if not len(error.images):
            raise
        images, interrupted = error.images, error
    seconds = time.perf_counter() - began
    if frames is not None and suffix == ".gif":
        save_gif(
            frames.batches(len(images)),
            out,
            columns=args.columns,
            scale=args.scale,
            value_range=model.diffused_range,
        )
    elif frames is not None:
        rows = torch.stack(frames.batches(len(images)), 1)
        layout = {"columns": rows.shape[1], "scale": args.scale, "value_range": model.diffused_range}
        save_grid(rows.flatten(0, 1), out, **layout)
    elif suffix == ".npz":
        save_npz(to_uint8(images, model.value_range), out, labels and labels[: len(images)], seed=args.seed)
    else:
        layout = {"columns": args.columns, "scale": args.scale}
        captions = captions and captions[: len(images)]
        save_grid(images, out, **layout, value_range=model.value_range, captions=captions)
    how = steps_taken(start, steps or model.schedule.max_steps, sampler)
    print(f"{out}: {counted(len(images), 'image')} in {seconds:.1f} s ({sampler}, {how})")
    if interrupted is not None:
        raise interrupted


def _captions(model: DDPM, labels: list[int] | None) -> list[str]:
    """The name of each label, or its number where the classes have no names."""
    if labels is None:
        raise ValueError("--captions needs labels to write below the images: give --labels")
    return [str(label) if model.class_names is None else model.class_names[label] for label in labels]


def is_folder(out: str) -> bool:
    """Whether images go into a folder of this name: it is a folder, ends in "/", or has no suffix."""
    return out.endswith(("/", os.sep)) or os.path.isdir(out) or not Path(out).suffix


def _evaluations(model: DDPM, options: dict[str, Any]) -> int:
    """The rows of the table for these options of `DDPM.sample`; some samplers have two for a step."""
    known = {"sampler", "steps", *options_of(options["sampler"])}
    return len(model.steps(**{name: value for name, value in options.items() if name in known}))


class _Frames:
    """Keeps x_t, or the predicted x_0, at `most` rows of the table, over all batches of one `sample`."""

    def __init__(self, steps: int, most: int, predicted: bool):
        last = steps - 1
        self.kept = sorted({round(i * last / (most - 1)) for i in range(most)} if most > 1 else {last})
        self.predicted = predicted
        self.images: dict[int, list[torch.Tensor]] = {i: [] for i in self.kept}

    def __call__(self, i: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        if i == 0:  # a batch begins; it may be a smaller one after running out of memory
            whole = len(self.images[self.kept[-1]])
            self.images = {step: images[:whole] for step, images in self.images.items()}
        if i in self.images:
            self.images[i].append((x0 if self.predicted else x).cpu())

    def batches(self, images: int) -> list[torch.Tensor]:
        return [torch.cat(self.images[i])[:images] for i in self.kept]
