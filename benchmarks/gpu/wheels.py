"""Installs wheels from a folder, for this run only: those packages that the machine lacks."""

import os
import subprocess
import sys
from pathlib import Path

from .part import Job, Run


def jobs(run: Run) -> list[Job]:
    return [("install", lambda: install(run))]


def install(run: Run) -> None:
    wheels = sorted(map(str, Path(os.environ["GPU_RUN_WHEELS"]).glob("*.whl")))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--upgrade", "--target", os.environ["GPU_RUN_SITE"], *wheels]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout, result.stderr)
    if result.returncode:
        raise RuntimeError(f"pip: {(result.stderr.strip().splitlines() or ['failed'])[-1]}")
    run.record(wheels=[Path(wheel).name for wheel in wheels])
