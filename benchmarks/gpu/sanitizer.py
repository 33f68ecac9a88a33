"""Every op under NVIDIA's compute-sanitizer: memory errors, races in shared memory, wrong barriers."""

import os
import shutil
import subprocess
import sys
from functools import partial

from .part import Finding, Job, Run

TOOLS = ("memcheck", "racecheck", "synccheck")


def jobs(run: Run) -> list[Job]:
    return [(tool, partial(check, run, tool)) for tool in (TOOLS[:1] if run.dry_run else TOOLS)]


def check(run: Run, tool: str) -> None:
    """Fails if the tool reports anything, or cannot run here."""
    command = [sys.executable, "-m", "benchmarks.gpu.sanitized", run.device]
    if not run.dry_run:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not os.access(program, os.X_OK):
            raise Finding("there is no compute-sanitizer")
        command = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *command]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout)
    lines = result.stdout.strip().splitlines() or [""]
    if result.returncode:
        found = [line.strip("= ") for line in lines if line.startswith("=========") and line.strip("= ")]
        raise Finding(f"{tool}, status {result.returncode}: {' | '.join(found[:3]) or lines[-1]}"[:280])
    run.record(tool=tool, said=lines[-1])
