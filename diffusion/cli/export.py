"""Write a model as a folder of diffusers, or its network as ONNX or as a program of torch.export."""

import argparse

from ..ddpm import load
from ..exporters.diffusers import to_diffusers
from ..exporters.onnx import check_onnx, to_onnx
from ..exporters.program import save_program
from ..storage.atomic import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="mnist", help="a bundled name, a folder, or hf:owner/name (default: %(default)s)")
    add("--out", metavar="FOLDER", help="write a pipeline folder that diffusers loads")
    add(
        "--sampler", help="with --out: ddpm, ddim or dpm++, whose scheduler is written (default: the model's)"
    )
    add("--steps", type=int, help="with --out: number of steps of the sampler (default: the model's)")
    add("--onnx", metavar="FILE", help="write the network as ONNX, in float32, for batches of any size")
    add("--program", metavar="FILE", help="write the network as a .pt2 file, for torch.export.load")


def run(args: argparse.Namespace) -> None:
    if not (args.out or args.onnx or args.program):
        raise ValueError("export needs --out FOLDER, --onnx FILE or --program FILE")
    for name in ("sampler", "steps"):
        if getattr(args, name) is not None and not args.out:
            raise ValueError(f"--{name} needs --out, the folder of the pipeline")
    if args.onnx:  # all checks come before any file
        check_onnx(args.onnx)
    if args.program:
        check_writable(args.program)
    model = load(args.model)
    if args.out:
        call = to_diffusers(model, args.out, sampler=args.sampler, steps=args.steps)
        arguments = ", ".join(f"{name}={value!r}" for name, value in call.items())
        print(f"{args.out}: a pipeline of diffusers; call it with {arguments}")
    if args.onnx:
        to_onnx(model, args.onnx)
        print(f"{args.onnx}: the network as ONNX")
    if args.program:
        save_program(model, args.program)
        print(f"{args.program}: the network as a program of torch.export")
