"""Write the network of a model as ONNX, or as a program of torch.export."""

import argparse

from ..ddpm import load
from ..exporters.onnx import to_onnx
from ..exporters.program import save_program


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="mnist", help="a bundled name, a folder, or hf:owner/name (default: %(default)s)")
    add("--onnx", metavar="FILE", help="write the network as ONNX, in float32, for batches of any size")
    add("--program", metavar="FILE", help="write the network as a .pt2 file, for torch.export.load")


def run(args: argparse.Namespace) -> None:
    if not (args.onnx or args.program):
        raise ValueError("export needs --onnx FILE or --program FILE")
    model = load(args.model)
    if args.onnx:
        to_onnx(model, args.onnx)
        print(f"{args.onnx}: the network as ONNX")
    if args.program:
        save_program(model, args.program)
        print(f"{args.program}: the network as a program of torch.export")
