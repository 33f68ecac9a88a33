"""Parity, speed and memory checks of this package on a GPU, in one run: bash benchmarks/gpu.sh.

Each part is a process with a limit of its own; a failure in one harms no other. Results are appended to
gpu.jsonl as they come, and a summary is printed last. The exit status is 0 where every part passed.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from .run import Part, Runner

# Parity, sanitizer and triton are not timed, so the peer's networks are compiled beside them.
PARTS = (
    Part("environment", 60, essential=True),
    Part("libraries", 200, essential=True),
    Part("compilation", 170, background=True),
    Part("parity", 70),
    Part("sanitizer", 70, job_limit=30),
    Part("triton", 50, module="benchmarks.gpu.parity"),
    Part("wgmma", 25, job_limit=12, timed=True),
    Part("ops", 60, job_limit=30, timed=True),
    Part("sampler", 110, job_limit=40, timed=True),
    Part("peer", 85, job_limit=40, timed=True),
    Part("training", 50, job_limit=40, timed=True),
)
WHEELS = Part("wheels", 30)


def main(words: list[str] | None = None) -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    names = [part.name for part in PARTS]
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "gpu-results"))
    parser.add_argument(
        "--seconds", type=float, default=520.0, help="limit of the whole run (default: %(default)s)"
    )
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use, such as diffusers 0.42.1's")
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--dry-run", action="store_true", help="run all parts small and on the CPU, to test the script itself"
    )
    args = parser.parse_args(words)
    if not args.seconds > 0:
        parser.error(f"argument --seconds: {args.seconds} is not a time; give seconds above 0")
    parts = list(PARTS)
    if args.wheels is not None:
        if not any(args.wheels.glob("*.whl")):
            parser.error(f"argument --wheels: there is no wheel in {args.wheels}")
        os.environ["GPU_RUN_WHEELS"] = str(args.wheels.resolve())
        parts = [WHEELS, *PARTS]
    if args.parts is not None:
        parts = [part for part in parts if part.essential or part is WHEELS or part.name in args.parts]
    fork = None
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same everywhere
        from . import stand_ins
        from .worker import main as fork

        stand_ins.preload()
    runner = Runner(args.out.resolve(), args.seconds - (time.monotonic() - begun), args.dry_run, fork)
    return runner.run(parts)


if __name__ == "__main__":
    sys.exit(main())
