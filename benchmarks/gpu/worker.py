"""Runs the jobs of one part: python -m benchmarks.gpu.worker MODULE --part NAME --out FOLDER ...

A module has `jobs(run)`, a list of names and functions. A job that raises ends the process, since it may
leave a device behind on which nothing works; the next process begins after it. Errors that do not
concern the device, a `Finding` or a missing package, are written down, and the next job begins at once.
"""

import argparse
import importlib
import json
import os
from pathlib import Path

from .part import Finding, Run


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
    run, status = Run(args.part, args.out, args.dry_run), 0
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
            try:
                job()
            except (Finding, ImportError) as error:
                run.record_error(error)
                status = 1
    except BaseException as error:
        run.record_error(error)
        return 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
