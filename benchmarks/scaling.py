"""Sampling by several ranks on one machine: python -m benchmarks.scaling.

Each count of ranks samples the same images into a new folder, one thread per rank, started as torchrun would
start them. Efficiency: images per second, relative to that many times the rate of one rank. The time of
starting is left out: each rank reports when it began and ended.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from diffusion import kernels
from diffusion.kernels.benchmarks import device_name

from .sampling.__main__ import versions
from .sampling.report import slug


def rate(world_size: int, num: int, options: list[str]) -> float:
    """Images per second from the first rank's start to the last one's end."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            sys.executable,
            "-m",
            "diffusion",
            "sample",
            "--num",
            str(num),
            "--out",
            f"{folder}/",
            *options,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
        processes = [
            subprocess.Popen(
                words,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for rank in range(world_size)
        ]
        if any([process.wait() for process in processes]):
            raise RuntimeError(f"a rank of {world_size} failed")
        ranks = [json.loads((Path(folder) / f".rank-{rank}.json").read_text()) for rank in range(world_size)]
    assert sum(entry["images"] for entry in ranks) == num
    seconds = max(entry["ended"] for entry in ranks) - min(entry["started"] for entry in ranks)
    return num / seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    add = parser.add_argument
    add("--ranks", nargs="+", type=int, default=[1, 2])
    add("--num", type=int, default=1000)
    add("--shard-size", type=int, default=100)
    add("--steps", type=int, default=20)
    add("--rounds", type=int, default=3, help="rounds over all counts; medians are printed (default: 3)")
    add("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    options = ["--shard-size", str(args.shard_size), "--steps", str(args.steps)]
    rounds = [[rate(count, args.num, options) for count in args.ranks] for _ in range(args.rounds)]
    rates = torch.tensor(rounds, dtype=torch.float64).median(0).values.tolist()
    result = {
        "device": device_name("cpu"),
        "versions": versions(),
        "build": kernels.build_info(),
        "protocol": f"{args.num} bundled digits, DDIM, {args.steps} steps, guidance 2, one thread per rank",
        "ranks": {
            str(count): {"images/s": value, "efficiency": value / count / (rates[0] / args.ranks[0])}
            for count, value in zip(args.ranks, rates, strict=True)
        },
    }
    for count, row in result["ranks"].items():
        print(f"{count} ranks: {row['images/s']:7.2f} images/s, efficiency {row['efficiency']:.0%}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"scaling-{slug(result['device'])}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
