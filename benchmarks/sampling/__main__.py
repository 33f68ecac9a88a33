"""Times sampling against what one would use instead, and writes JSON and a report with plots.

A peer whose images differ is not timed. Ratios are of medians of runs that take turns in one process.
"""

import argparse
import importlib.metadata
import platform
import resource
from pathlib import Path

import torch

from diffusion import kernels

from . import peers, report, timing
from .models import make

GUIDANCE = {"unconditional": 1.0, "guided": 3.0}
PACKAGES = ("torch", "diffusers", "openvino", "onnxruntime", "triton")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(args: argparse.Namespace) -> dict:
    device = args.device
    result = {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "build": kernels.build_info(),
        "matrix_rate": {
            name: timing.matrix_rate(dtype, device)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        },
        "chains": [],
        "parts": [],
        "growth": [],
    }
    for model in args.models:
        pair = make(model)
        largest = ("unconditional", args.batches[-1]) if device == "cpu" else None
        for mode, guidance in GUIDANCE.items():
            for count in args.batches:
                rows = timing.compare(pair, count, guidance, device, args.peers, args.seconds)
                where = {"model": model, "mode": mode, "batch": count, "flops": pair.flops}
                for name, row in rows.items():
                    if "step" in row and args.memory and (mode, count) == largest:
                        row["memory"] = timing.peak_memory(model, count, guidance, name)
                    result["chains"].append({**where, "peer": name, **row})
                print(report.short_table(where, rows), flush=True)
                if device == "cpu":
                    for tier in ("exact", "fast"):
                        spent = timing.parts(pair, count, guidance, tier)
                        result["parts"].append({**where, "tier": tier, "seconds": spent})
    names = [name for name in ("exact", "diffusers") if name in args.peers]
    for size, count in args.growth:
        pair = make("cifar10", size)
        rows = timing.compare(pair, count, 1.0, device, names, args.seconds / 4)
        result["growth"].append(
            {"size": size, "batch": count, "step": {n: r.get("step") for n, r in rows.items()}}
        )
        print(f"{size} x {size}, batch {count}: {result['growth'][-1]['step']}", flush=True)
    return result


def measure_memory(model: str, count: str, guidance: str, name: str) -> None:
    make_peer = peers.PEERS[name][0]
    make_peer(make(model), int(count), float(guidance), "cpu")(2)
    print(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


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
    add("--batches", nargs="+", type=int, help="(default: 1 8, and 64 on a GPU)")
    add("--growth", nargs="*", type=pair_of_numbers, help="image size x batch, such as 64x4")
    add("--seconds", type=float, default=60.0, help="for each comparison (default: %(default)s)")
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="peak memory of the largest batch, in processes of their own",
    )
    add(
        "--out",
        type=Path,
        default=Path(__file__).parent.parent / "results",
        help="folder (default: %(default)s)",
    )
    add("--measure-memory", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure_memory:
        return measure_memory(*args.measure_memory)
    args.batches = args.batches or ([1, 8, 64] if args.device == "cuda" else [1, 8])
    if args.growth is None:
        args.growth = [(32, 1), (32, 2), (32, 4), (32, 16), (16, 4), (64, 4)]
    result = measure(args)
    for path in report.write(result, args.out, args.device):
        print(path)
    return None


if __name__ == "__main__":
    main()
