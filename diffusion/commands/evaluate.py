"""Judge a model of MNIST's digits: class accuracy under guidance, Fréchet distance without it."""

import argparse
import json
from pathlib import Path

from ..ddpm import load
from ..evaluate import evaluate, format_report
from ..files import check_writable, replacing
from .sample import default_device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="mnist", help="bundled name, folder, or hf:owner/name (default: %(default)s)")
    add("--num", type=int, default=1000, help="samples for each of the two measures (default: %(default)s)")
    add("--guidance-scale", type=float, default=2.0, help="for the class accuracy (default: %(default)s)")
    add("--sampler", default="ddim", help="ddpm, ddim or dpm++ (default: %(default)s)")
    add("--steps", type=int, default=50, help="of the chain, 1 to T (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add(
        "--data-dir",
        help="measure real digits on MNIST there (default: figures that come with the package)",
    )
    add(
        "--classifier",
        metavar="DIR",
        help="another one, made by `python -m diffusion.classifier`",
    )
    add("--batch-size", type=int, help="images made at a time")
    add("--device", help="cpu, cuda, cuda:1, mps (default: cuda where there is one)")
    add("--tier", default="exact", help="exact or fast, which computes in bfloat16 (default: %(default)s)")
    add("--dtype", help="of the UNet: float32, bfloat16 or float16 (default: the tier's)")
    add("--backend", default="auto", help="of the kernels (default: auto)")
    add("--out", metavar="FILE.json", help="write the result there too")


def run(args: argparse.Namespace) -> None:
    if args.out:
        check_writable(args.out)
    result = evaluate(
        load(args.model, args.device or default_device()),
        num=args.num,
        guidance_scale=args.guidance_scale,
        sampler=args.sampler,
        steps=args.steps,
        seed=args.seed,
        data_dir=args.data_dir,
        classifier=args.classifier,
        batch_size=args.batch_size,
        progress=True,
        dtype=args.dtype,
        backend=args.backend,
        tier=args.tier,
    )
    print(format_report(result))
    if args.out:
        with replacing(Path(args.out)) as (temporary,):
            temporary.write_text(json.dumps(result, indent=2) + "\n")
