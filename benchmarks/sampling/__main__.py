"""Times sampling beside the alternatives of a user, and writes JSON and a report with plots.

A peer whose images differ is not timed. Ratios are of medians of runs that take turns in one process, a new
one for each comparison.
"""

import argparse
import importlib.metadata
import json
import platform
from pathlib import Path

import torch

from diffusion import kernels
from diffusion.kernels.benchmarks import device_name

from ..matrix_rate import matrix_rate
from . import peers, peers_plot, report, timing
from .models import make

GUIDANCE = {"unconditional": 1.0, "guided": 3.0}
COUNTED_STEPS = (1, 2, 5, 10, 20)
PACKAGES = ("torch", "diffusers", "openvino", "onnxruntime", "triton")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def measure(args: argparse.Namespace) -> dict:
    device = args.device
    result = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "build": kernels.build_info(),
        "matrix_rate": {
            name: matrix_rate(dtype, lambda run: timing.medians({"": run}, device, 1.0)[""], device)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        },
        "chains": [],
        "parts": [],
        "growth": [],
        "steps": {},
    }
    shared = ["--device", device, "--seconds", args.seconds, "--peers", *args.peers]
    for model in args.models:
        largest = ("unconditional", args.batches[-1]) if device == "cpu" else None
        for mode, guidance in GUIDANCE.items():
            for count in args.batches:
                what = timing.in_a_process(*shared, "--compare", model, count, guidance)
                where = {"model": model, "mode": mode, "batch": count, "flops": what["flops"]}
                for name, row in what["rows"].items():
                    if "step" in row and args.memory and (mode, count) == largest:
                        row["memory"] = timing.in_a_process("--measure-memory", model, count, guidance, name)
                    result["chains"].append({**where, "peer": name, **row})
                result["parts"] += [{**where, "precision": t, "seconds": s} for t, s in what["parts"].items()]
                print(report.short_table(where, what["rows"]), flush=True)
    names = [name for name in ("exact", "diffusers") if name in args.peers]
    shared = ["--device", device, "--seconds", args.seconds / 4, "--peers", *names]
    for size, count in args.growth:
        what = timing.in_a_process(*shared, "--size", size, "--compare", "cifar10", count, 1.0)
        steps = {name: row.get("step") for name, row in what["rows"].items()}
        result["growth"].append({"size": size, "batch": count, "step": steps})
        print(f"{size} x {size}, batch {count}: {steps}", flush=True)
    if args.growth:
        result["steps"] = timing.in_a_process(*shared, "--count-steps", args.models[0]) or {}
    return result


def compare(args: argparse.Namespace) -> dict:
    """One comparison, in a process of its own; on the CPU also the parts of a step's time."""
    model, count, guidance = args.compare[0], int(args.compare[1]), float(args.compare[2])
    pair = make(model, args.size)
    rows = timing.compare(pair, count, guidance, args.device, args.peers, args.seconds)
    precisions = ("exact", "fast") if args.device == "cpu" and args.size is None else ()
    parts = {precision: timing.parts(pair, count, guidance, precision) for precision in precisions}
    return {"rows": rows, "parts": parts, "flops": pair.flops}


def count_steps(args: argparse.Namespace) -> dict:
    """The time of a call by its number of steps, for one image."""
    pair = make(args.count_steps)
    times = timing.by_steps(pair, 1, args.device, args.peers, COUNTED_STEPS, args.seconds)
    return {"model": pair.name, "steps": COUNTED_STEPS, "seconds": times}


def measure_memory(model: str, count: str, guidance: str, name: str) -> int | None:
    make_peer = peers.PEERS[name][0]
    make_peer(make(model), int(count), float(guidance), "cpu")(2)
    return timing.peak_memory()


def pair_of_numbers(text: str) -> tuple[int, int]:
    size, count = text.split("x")
    return int(size), int(count)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__)
    add = parser.add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, choices=["cpu", "cuda"])
    add("--models", nargs="+", default=["cifar10", "mnist"], choices=["cifar10", "mnist"])
    add("--peers", nargs="+", default=list(peers.PEERS), choices=list(peers.PEERS))
    add("--batches", nargs="+", type=int, help="batch sizes (default: 1 8, and 64 on a GPU)")
    add(
        "--growth",
        nargs="*",
        type=pair_of_numbers,
        help="image sizes and batches for the growth of a step, such as 64x4",
    )
    add("--seconds", type=float, default=60.0, help="for each comparison (default: %(default)s)")
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the peak memory of the largest batch, in processes of their own",
    )
    add(
        "--out",
        type=Path,
        default=Path(__file__).parent.parent / "results",
        help="folder for the results (default: %(default)s)",
    )
    add(
        "--plot",
        nargs=2,
        type=Path,
        metavar=("RESULT.json", "PICTURE"),
        help="measure nothing: draw README's plot from an earlier result",
    )
    add("--compare", nargs=3, help=argparse.SUPPRESS)  # these four are for the processes that this one starts
    add("--count-steps", help=argparse.SUPPRESS)
    add("--size", type=int, help=argparse.SUPPRESS)
    add("--measure-memory", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plot:
        return peers_plot.draw(*args.plot)
    if args.compare:
        return print(json.dumps(compare(args)))
    if args.count_steps:
        return print(json.dumps(count_steps(args)))
    if args.measure_memory:
        return print(json.dumps(measure_memory(*args.measure_memory)))
    args.batches = args.batches or ([1, 8, 64] if args.device == "cuda" else [1, 8])
    if args.growth is None:
        args.growth = [(32, 1), (32, 2), (32, 4), (32, 16), (16, 4), (64, 4)]
    result = measure(args)
    for path in report.write(result, args.out, args.device):
        print(path)
    return None


if __name__ == "__main__":
    main()
