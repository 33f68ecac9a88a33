"""The arguments of the jobs of a part, and the exception that reports a wrong result."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import results

Job = tuple[str, Callable[[], None]]


class Finding(Exception):
    """A job failed, for example by a wrong result, but the device is still usable."""


class Run:
    """The arguments of the jobs of a part.

    device: "cuda", or "cpu" in a dry run, in which everything is small. record: writes a result.
    """

    def __init__(self, part: str, out: Path, dry_run: bool):
        self.part, self.out, self.dry_run = part, out, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.job: str | None = None

    def record(self, **values: Any) -> None:
        results.append(self.out / "gpu.jsonl", part=self.part, job=self.job, **values)

    def record_error(self, error: BaseException) -> None:
        traceback.print_exception(error)
        lines = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, Finding) else f"{type(error).__name__}: "
        self.record(error=f"{kind}{lines[0][:300]}")

    def results(self, part: str) -> list[dict[str, Any]]:
        """The results that a part has written so far."""
        return [row for row in results.read(self.out / "gpu.jsonl") if row.get("part") == part]
