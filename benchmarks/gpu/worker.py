"""Runs the jobs of one part: python -m benchmarks.gpu.worker MODULE --part NAME --out FOLDER ...

A module has `jobs(run)`, a list of names and functions. A job that fails ends the process, since it may leave
a device behind on which nothing works; the next process begins after it.
"""

import argparse
import importlib
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import results

Job = tuple[str, Callable[[], None]]


class Run:
    """What the jobs of a part are given.

    device: "cuda", or "cpu" in a dry run, in which everything is small. record: writes a result.
    """

    def __init__(self, part: str, out: Path, dry_run: bool):
        self.part, self.out, self.dry_run = part, out, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.job: str | None = None

    def record(self, **values: Any) -> None:
        results.append(self.out / "gpu.jsonl", part=self.part, job=self.job, **values)

    def results(self, part: str) -> list[dict[str, Any]]:
        """What a part has written so far."""
        return [row for row in results.read(self.out / "gpu.jsonl") if row.get("part") == part]


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--part", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--progress", type=Path, required=True, help="holds number, count and name of the job"
    )
    parser.add_argument("--start", type=int, default=0, help="number of the first job")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(words)
    run = Run(args.part, args.out, args.dry_run)
    try:
        if args.dry_run:
            from . import stand_ins

            stand_ins.install()
        jobs = importlib.import_module(args.module).jobs(run)
        for number, (name, job) in enumerate(jobs):
            if number < args.start:
                continue
            run.job = name
            progress = args.progress.with_suffix(".new")
            progress.write_text(json.dumps([number, len(jobs), name]))
            os.replace(progress, args.progress)
            job()
    except BaseException as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        run.record(error=f"{type(error).__name__}: {lines[0][:300]}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
