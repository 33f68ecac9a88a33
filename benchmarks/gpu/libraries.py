"""The compiled libraries: those in kernels/ if they load and match the sources, else built here."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from .part import Job, Run

ROOT = Path(__file__).parents[2]


def jobs(run: Run) -> list[Job]:
    return [("load", lambda: load(run))]


def state() -> dict[str, Any]:
    """The libraries that are loaded, and whether they were built from the sources beside them."""
    from diffusion.kernels import _native

    record = _native._read_record(_native.FOLDER)
    return {
        "build": _native.build_info(),
        "of_these_sources": record.get("sources") == _native.digest_of_sources(_native.SOURCES),
    }


def reason_to_build(found: dict[str, Any]) -> str | None:
    """The reason to build the libraries here, or None."""
    if found["build"]["cuda"] != "loaded":
        return found["build"]["cuda"]
    return None if found["of_these_sources"] else "the libraries were built from other sources"


def load(run: Run) -> None:
    if run.dry_run:
        found = state()
        run.record(**found, reason=reason_to_build(found), built=False)
        return
    found = _state_in_a_process()
    reason = reason_to_build(found)
    if reason is not None:
        print(f"building, since {reason}", flush=True)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, check=True)
        found = _state_in_a_process()
    run.record(**found, reason=reason, built=reason is not None)
    if found["build"]["cuda"] != "loaded":
        raise RuntimeError(found["build"]["cuda"])


def _state_in_a_process() -> dict[str, Any]:
    """The libraries that a new process loads; none if the process fails to start."""
    result = subprocess.run([sys.executable, "-m", __name__], capture_output=True, text=True)
    print(result.stdout, result.stderr, flush=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
        return {"build": {"cuda": f"importing the package failed: {lines[-1]}"}, "of_these_sources": False}
    return json.loads(result.stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(state()))
