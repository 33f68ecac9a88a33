"""Every op under NVIDIA's compute-sanitizer: memory errors, races in shared memory, wrong barriers."""

import os
import shutil
import subprocess
import sys
import time
from functools import partial

from .part import Finding, Job, Run

TOOLS = ("memcheck", "racecheck", "synccheck")
WHAT = ("ops", "wgmma")  # attention by wgmma in a process of its own: it may hang
SECONDS = 27.0  # limit of one tool


def jobs(run: Run) -> list[Job]:
    return [(tool, partial(check, run, tool)) for tool in (TOOLS[:1] if run.dry_run else TOOLS)]


def check(run: Run, tool: str) -> None:
    """Fails if the tool reports anything, or cannot run here. Both processes run at once."""
    prefix = []
    if not run.dry_run:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        if not os.access(program, os.X_OK):
            raise Finding("there is no compute-sanitizer")
        prefix = [program, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    end, options = time.monotonic() + SECONDS, {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    processes = {}
    for what in WHAT:
        command = [*prefix, sys.executable, "-m", "benchmarks.gpu.sanitized", run.device, what]
        processes[what] = subprocess.Popen(command, text=True, **options)
    failures = []
    for what, process in processes.items():
        reason, said = finish(process, end - time.monotonic())
        run.record(tool=tool, what=what, said=said, wrong=reason)
        failures += [] if reason is None else [f"{what}, {reason}"]
    if failures:
        raise Finding(f"{tool}: {'; '.join(failures)}"[:280])


def finish(process: subprocess.Popen, seconds: float) -> tuple[str | None, str]:
    """Why a process failed, or None, and its last line; after so many seconds, it is killed."""
    late = False
    try:
        output, _ = process.communicate(timeout=max(0.0, seconds))
    except subprocess.TimeoutExpired:
        late = True
        process.kill()
        output, _ = process.communicate()
    print(output)
    lines = output.strip().splitlines() or [""]
    found = [line.strip("= ") for line in lines if line.startswith("=========") and line.strip("= ")]
    if late:
        return f"killed after {SECONDS:.0f} s: {' | '.join(found[-3:])}", lines[-1]
    if process.returncode:
        return f"status {process.returncode}: {' | '.join(found[:3]) or lines[-1]}", lines[-1]
    return None, lines[-1]
