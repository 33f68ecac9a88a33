"""The effect of each `precision` on the images of the bundled digits: python -m benchmarks.precision.

The same images are sampled by plain PyTorch in float32 and in each precision. The result has the differences
of the images in [-1, 1], the class accuracy by an independent classifier, and the Fréchet distance in its
features; see `diffusion.evaluation.accuracy`.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import diffusion
from diffusion.evaluation.accuracy import evaluate
from diffusion.kernels import build_info
from diffusion.kernels.benchmarks import device_name

from .sampling.__main__ import versions
from .sampling.report import slug

WAYS = {"reference": {"backend": "reference"}, "exact": {"precision": "exact"}, "fast": {"precision": "fast"}}


class _Kept:
    """A model that keeps its samples."""

    def __init__(self, model: diffusion.DDPM):
        self.model, self.samples = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def sample(self, *args, **options) -> torch.Tensor:
        self.samples.append(self.model.sample(*args, **options))
        return self.samples[-1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    model = diffusion.load("mnist", args.device)
    result = {
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "build": build_info(),
        "protocol": f"{args.num} digits, DDIM, {args.steps} steps, guidance 2 (for the distance 1), seed 0",
        "precisions": {},
    }
    expected = None
    for name, options in WAYS.items():
        kept, start = _Kept(model), time.perf_counter()
        judged = evaluate(kept, num=args.num, steps=args.steps, progress=True, **options)
        row = {
            "seconds": time.perf_counter() - start,
            "class accuracy": judged["class_accuracy"]["accuracy"],
            "Frechet distance": judged["frechet"]["distance"],
            "of real digits": judged["frechet"]["real"][judged["frechet"]["drawn"]]["distance"],
        }
        guided, plain = kept.samples
        expected = expected or (guided, plain)
        for mode, images, reference in (("guided", guided, expected[0]), ("unguided", plain, expected[1])):
            difference = (images - reference).abs()
            row[f"mean difference, {mode}"] = difference.mean().item()
            row[f"largest difference, {mode}"] = difference.max().item()
        result["precisions"][name] = row
        print(name, json.dumps(row, indent=1), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    threads = f"-{result['threads']}" if args.device == "cpu" else ""
    path = args.out / f"precision-{slug(result['device'])}{threads}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
