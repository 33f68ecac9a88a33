"""Options of `diffusion sample` for images to start from or to invert, and for animations between noises."""

import argparse
import contextlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from .. import kernels
from ..ddpm import DDPM
from ..inference.repaint import repaint_rows
from ..inference.start import JUMP_LENGTH, RESAMPLES, STRENGTH
from ..process.interpolation import slerp
from ..samplers import EVALUATE_TWICE, options_of
from ..samplers.table import first_step
from ..storage.images import save_gif, save_grid
from ..utils.validation import whole_number
from ..utils.words import counted
from .options import choose_labels

START_OPTIONS = ("strength", "mask", "resamples", "jump_length", "invert")  # of --image
# An inversion has no noise, and a clipped step has no inverse.
NOT_INVERTED: tuple[str, ...] = ("strength", "mask", "clip", "eta", "noise_in_last_step")
NOT_INVERTED += ("dynamic_threshold", "dynamic_threshold_max")  # which clip, too
INVERTED: dict[str, Any] = {"clip": None, "eta": 0.0}  # with which the noise of an inversion is sampled
ITERATIONS = 5


def add_start_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options about what sampling starts from."""
    add = parser.add_argument
    add(
        "--image",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="images to change; their middle is scaled to the model's size (default labels: none)",
    )
    add("--strength", type=float, help="with --image: share of the steps that are taken (default: 0.8)")
    add("--mask", metavar="FILE", help="with --image: paint anew where this picture is white, by RePaint")
    add("--resamples", type=int, help="with --mask: how often each step is taken (default: 10; 1 for heun)")
    add("--jump-length", type=int, help="with --mask: steps that are repeated together (default: 1)")
    add(
        "--invert",
        nargs="*",
        metavar="LABEL",
        help="with --image: start from the noise of which ddim makes the images, with these labels of theirs "
        "(default: none); --labels are those of the samples (default: the same), and --guidance-scale is by "
        "default 1",
    )
    add(
        "--iterations",
        type=int,
        help=f"with --invert: evaluations of the network in each step (default: {ITERATIONS})",
    )
    add(
        "--interpolate",
        type=int,
        metavar="FRAMES",
        help="a .gif from the noise of --seed to that of the next seed and back, or a picture with a row of "
        "FRAMES for each image",
    )


def check_start_options(args: argparse.Namespace, suffix: str, sharded: bool) -> None:
    """ValueError, naming the option, where these options do not fit each other or the output."""
    for name in START_OPTIONS:
        if getattr(args, name) is not None and args.image is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --image")
    for name in ("resamples", "jump_length"):
        if getattr(args, name) is not None and args.mask is None:
            raise ValueError(f"--{name.replace('_', '-')} needs --mask")
    if args.iterations is not None and args.invert is None:
        raise ValueError("--iterations needs --invert")
    if args.invert is not None:
        _check_inversion(args)
    if args.x0:
        _check_x0(args, suffix, sharded)
    if sharded and (args.image or args.interpolate is not None):
        raise ValueError(
            "--image and --interpolate write into one file; end the name of --out in .png or .gif"
        )
    if args.mask is not None and suffix == ".gif":
        raise ValueError("--mask repeats steps, of which no .gif is made; end the name of --out in .png")
    if args.interpolate is None:
        return
    whole_number("--interpolate", args.interpolate, 2, 1000)
    if args.image is not None:
        raise ValueError("--interpolate goes between noises, and --image is none; leave out one of them")
    if suffix == ".npz":
        raise ValueError("--interpolate makes a .gif or a picture; end the name of --out in .gif or .png")
    if args.captions:
        raise ValueError("--interpolate writes no --captions; leave out one of them")
    if args.columns is not None and suffix != ".gif":
        raise ValueError("--interpolate makes a picture with a row for each image; leave out --columns")


def _check_inversion(args: argparse.Namespace) -> None:
    for name in NOT_INVERTED:
        value = getattr(args, name)
        if value is not None and value is not False:  # and 0 is given, too
            raise ValueError(f"--invert has no noise and no clipping: leave out --{name.replace('_', '-')}")
    if args.sampler not in (None, "ddim"):
        raise ValueError(f"--invert is of the sampler ddim, not {args.sampler}: leave out --sampler")


def _check_x0(args: argparse.Namespace, suffix: str, sharded: bool) -> None:
    if sharded or suffix == ".npz":
        raise ValueError("--x0 makes a .gif or a picture; end the name of --out in .gif or .png")
    for name in ("mask", "interpolate", "captions"):
        if getattr(args, name):
            raise ValueError(f"--x0 shows the steps of whole images, without --{name}; leave out one of them")


def start_arguments(args: argparse.Namespace, model: DDPM) -> dict[str, Any]:
    """The arguments of `DDPM.sample` that these options give; says how pictures are scaled."""
    if args.image is None:
        return {}
    found: dict[str, Any] = {"image": [_picture(path, model) for path in args.image]}
    if args.invert is not None:
        return found
    if args.mask is not None:
        found["mask"] = _picture(args.mask, model)
    else:
        found["strength"] = STRENGTH
    given = {name: getattr(args, name) for name in ("strength", "resamples", "jump_length")}
    return found | {name: value for name, value in given.items() if value is not None}


class _Begun(Exception):
    """Sampling has taken its arguments, and a step."""


def check_samples(model: DDPM, labels: list[int] | None, num: int, options: dict[str, Any]) -> None:
    """ValueError if `DDPM.sample` would refuse these arguments after an inversion, which takes long.

    The first step is taken, so that every check of `DDPM.sample` has its say.
    """

    def stop(i: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        raise _Begun

    with contextlib.suppress(_Begun):
        model.sample(labels, num_samples=num, callback=stop, **(options | INVERTED))


def inversion(
    args: argparse.Namespace, model: DDPM, images: list[Image.Image], num: int, options: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of `DDPM.sample` that start `num` samples from the noise of these images, in turn.

    options: further arguments of `DDPM.sample`, which are those of the inversion too.
    """
    if len(args.invert or ()) > len(images):
        raise ValueError(
            f"--invert has {counted(len(args.invert), 'label')} for {len(images)} of --image: "
            "give each image its label"
        )
    labels, _ = choose_labels(model, args.invert or ["none"], len(images))
    shared = ("steps", "guidance_rescale", "guidance_parallel", "batch_size", "backend", "precision", "dtype")
    how = {name: value for name, value in options.items() if name in (*shared, *options_of("ddim"))}
    if labels is None:
        how["guidance_scale"] = 1.0
    iterations = ITERATIONS if args.iterations is None else args.iterations
    noise = model.invert(images, labels, iterations=iterations, progress=True, **how)
    chosen = torch.arange(num, device=noise.device) % len(noise)
    return {"noise": noise[chosen], **INVERTED}


def steps_taken(start: dict[str, Any], steps: int, sampler: str) -> str:
    """The steps that a sampler of so many takes with the arguments of `start_arguments`, in words."""
    taken = steps - first_step(steps, start.get("strength", 1.0))
    share = f"{taken} of {counted(steps, 'step')}" if "strength" in start else counted(steps, "step")
    if "mask" not in start:
        return share
    resamples = 1 if sampler in EVALUATE_TWICE else RESAMPLES
    repeats = start.get("resamples", resamples), start.get("jump_length", JUMP_LENGTH)
    return f"{share}, taken {counted(len(repaint_rows(taken, *repeats)), 'time')} in all"


def _picture(path: str, model: DDPM) -> Image.Image:
    """A picture, upright. ValueError naming the file if it is no image."""
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
            picture.load()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else "it is no image that can be read"
        raise ValueError(f"cannot read {path}: {reason}") from error
    height, width = model.unet.config.image_shape
    if picture.size != (width, height):
        print(
            f"{path}: the middle of {picture.width} x {picture.height} pixels, scaled to {width} x {height}"
        )
    return picture


def interpolated(
    model: DDPM, labels: list[int] | None, num: int, frames: int, seed: int, options: dict[str, Any]
) -> torch.Tensor:
    """Samples on the way from the noise of `seed` to that of seed + 1, [frames, num, C, H, W].

    labels: of the num images, or None. options: further arguments of `DDPM.sample`.
    """
    config = model.unet.config
    shape = (num, config.in_channels, *config.image_shape)
    ends = [kernels.philox_normal(shape, seed=number % 2**64, stream=0) for number in (seed, seed + 1)]
    shares = [frame / (frames - 1) for frame in range(frames)]
    x = model.sample(
        None if labels is None else labels * frames,
        noise=slerp(ends[0], ends[1], shares).flatten(0, 1),
        sample_ids=list(range(num)) * frames,  # the noise of a step is that of the image
        seed=seed,
        progress=True,
        **options,
    )
    return x.unflatten(0, (frames, num))


def save_interpolated(x: torch.Tensor, out: Path, model: DDPM, columns: int | None, scale: int) -> None:
    """Writes [frames, N, C, H, W] as a .gif there and back, or as a picture with a row for each image."""
    how: dict[str, Any] = {"scale": scale, "value_range": model.value_range}
    if out.suffix.lower() == ".gif":
        frames = [*x, *x[1:-1].flip(0)]
        save_gif(frames, out, columns=columns, duration=0.08, hold=0.08, **how)
    else:
        save_grid(x.transpose(0, 1).flatten(0, 1), out, columns=len(x), **how)
