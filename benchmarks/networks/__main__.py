"""Times networks that people hold, by PyTorch, `diffusion.accelerate`, OpenVINO and ONNX Runtime.

Each network and precision is a process of its own, in which all ways take turns on the same random weights.
A way whose output differs is not timed. Writes JSON, and a page with a picture.
"""

import argparse
import datetime
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from diffusion import kernels
from diffusion.kernels.benchmarks import device_name

from ..sampling import timing
from ..sampling.__main__ import versions
from . import report
from .comparison import compare, peak_memory
from .models import MODELS
from .ways import EXPORTED, WAYS, Task, export

DTYPES = {"float32": True, "bfloat16": False}
GROWING = "ddpm-cifar10"
GROWTH = {"batch": (1, 2, 4, 8), "threads": (1, 2), "size": (16, 32, 64)}
ROOT = Path(__file__).parent.parent.parent


def in_a_process(*words: object) -> object:
    return timing.in_a_process(*words, module="benchmarks.networks")


def measure_one(
    args: argparse.Namespace,
    name: str,
    batch: int,
    size: int | None,
    threads: int,
    memory: bool,
    share: float,
) -> dict[str, dict]:
    """The rows of one comparison. share: of the seconds that are spent on a comparison.

    The ways of one precision share a process, so that the largest network fits into memory.
    """
    with tempfile.TemporaryDirectory(prefix="fused-diffusion-networks-") as folder:
        where = ["--threads", threads, "--folder", folder, "--batch", batch]
        where += (["--small"] if args.small else []) + ([] if size is None else ["--size", size])
        exported = not any(way in EXPORTED for way in args.ways) or in_a_process(*where, "--export", name)
        ways = [way for way in args.ways if exported or way not in EXPORTED]
        rows = {way: {"reason": "the export as ONNX failed"} for way in args.ways if way not in ways}
        for single in (True, False):
            group = [way for way in ways if WAYS[way].single == single]
            seconds = args.seconds * share * len(group) / len(args.ways)
            rules = ["--seconds", seconds, "--repeats", args.repeats, "--steps", args.steps]
            failed = {way: {"reason": "the comparison's process failed"} for way in group}
            found = in_a_process(*where, *rules, "--ways", *group, "--compare", name) if group else None
            rows |= found if isinstance(found, dict) else failed
        for way, row in rows.items():
            if memory and "seconds" in row:
                row["memory"] = in_a_process(*where, "--ways", way, "--measure-memory", name)
    return {way: rows[way] for way in args.ways}


def measure(args: argparse.Namespace) -> dict:
    """The whole result, as JSON holds it."""
    result = {
        "device": device_name("cpu"),
        "threads": args.threads,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "small": args.small,
        "steps": args.steps,
        "versions": versions(),
        "build": kernels.build_info(),
        "networks": [],
        "growth": [],
    }
    for name in args.networks:
        for batch in args.batches or MODELS[name].batches:
            rows = measure_one(args, name, batch, None, args.threads, args.memory, 1.0)
            result["networks"].append({"network": name, "batch": batch, "ways": rows})
            print(report.short_table(result["networks"][-1]), flush=True)
    if args.growth:
        own = {"batch": 4, "threads": args.threads, "size": MODELS[GROWING].size(args.small)}
        for along, values in GROWTH.items():
            for value in values:
                point = own | {along: value}
                rows = measure_one(
                    args, GROWING, point["batch"], point["size"], point["threads"], False, 0.25
                )
                seconds = {way: row.get("seconds") for way, row in rows.items()}
                result["growth"].append({"along": along, **point, "seconds": seconds})
                print(f"{along} {value}: {seconds}", flush=True)
    return result


def _run_part(args: argparse.Namespace) -> object:
    """The work of a process that `in_a_process` started."""
    name = args.export or args.compare or args.measure_memory
    batch = args.batch or MODELS[name].batches[0]
    task = Task(MODELS[name], args.small, batch, args.size, args.folder)
    if args.export:
        export(task)
        return True
    if args.compare:
        return compare(task, args.ways, args.steps, args.seconds, args.repeats)
    return peak_memory(task, args.ways[0])


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__)
    add = parser.add_argument
    add("--networks", nargs="+", default=list(MODELS), choices=list(MODELS))
    add("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="of evaluating (default: all)")
    add("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="of the ways")
    add("--batches", nargs="+", type=positive, help="batch sizes (default: those of each network's aim)")
    add("--steps", type=positive, default=3, help="evaluations in a loop of DDIM (default: %(default)s)")
    add("--repeats", type=positive, default=3, help="loops of each way at least (default: %(default)s)")
    add("--seconds", type=float, default=60.0, help="for each comparison (default: %(default)s)")
    add("--threads", type=positive, default=2, help="default: %(default)s")
    add("--small", action="store_true", help="tiny networks of the same kinds, to test the benchmark")
    add(
        "--memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure peak memory, in processes of their own",
    )
    add(
        "--growth",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"time {GROWING} by batch, threads and size",
    )
    add("--json", type=Path, help="file of the result (default: benchmarks/results/networks-DEVICE.json)")
    add("--page", type=Path, default=ROOT / "docs" / "networks.md", help="the page (default: %(default)s)")
    hidden = {"help": argparse.SUPPRESS}  # these are for the processes that this one starts
    add("--export", **hidden)
    add("--compare", **hidden)
    add("--measure-memory", **hidden)
    add("--batch", type=positive, **hidden)
    add("--size", type=positive, **hidden)
    add("--folder", type=Path, **hidden)
    args = parser.parse_args(words)
    precise = {DTYPES[name] for name in args.precisions}
    args.ways = [way for way in args.ways if WAYS[way].single in precise]
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.export or args.compare or args.measure_memory:
        print(json.dumps(_run_part(args)))
        return
    result = measure(args)
    args.json = args.json or ROOT / "benchmarks" / "results" / f"networks-{report.stem(result)}.json"
    for path in report.write(result, args.json, args.page):
        print(path)


if __name__ == "__main__":
    main()
