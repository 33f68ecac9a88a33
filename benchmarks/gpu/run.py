"""The plan of a run: its parts one after another, each in a process of its own and within its limit."""

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import results, summary
from .process import Process

ROOT = Path(__file__).parents[2]
PAUSE = 0.02  # seconds between two looks at a process
LEAST = 3.0  # seconds in which a part can do something


@dataclass(frozen=True)
class Part:
    """limit, job_limit: seconds for the whole part, and from the beginning of one of its jobs to the next.

    essential: without it nothing else makes sense. background: it runs beside those that follow, until one
    that is timed; it has passed if it finished some of its jobs by then.
    """

    name: str
    limit: float
    job_limit: float = 600.0
    module: str | None = None
    essential: bool = False
    timed: bool = False
    background: bool = False


@dataclass
class Attempt:
    """A part while it runs. seconds: its limit. failures: one line for each failure."""

    part: Part
    seconds: float
    begun: float = field(default_factory=time.monotonic)
    start: int = 0
    done: int = 0
    errors: int = 0  # number of its workers' messages that `failures` has
    failures: list[str] = field(default_factory=list)
    process: Process | None = None
    cpu: float = 0.0
    seen: Any = None
    seen_at: float = 0.0
    over: bool = False

    @property
    def end(self) -> float:
        return self.begun + self.seconds


class Runner:
    """out: folder for gpu.jsonl, gpu.log and summary.txt. seconds: for all parts together.

    fork: the worker's main, which a dry run calls in forks of this process: importing PyTorch a dozen times
    would take longer than the parts.
    """

    def __init__(self, out: Path, seconds: float, dry_run: bool = False, fork: Callable | None = None):
        self.out, self.dry_run, self.fork = out, dry_run, fork
        self.end = time.monotonic() + seconds
        self.file, self.log = out / "gpu.jsonl", out / "gpu.log"
        self.current: Attempt | None = None
        self.behind: Attempt | None = None
        out.mkdir(parents=True, exist_ok=True)
        for path in (self.file, self.log, out / "summary.txt"):
            path.unlink(missing_ok=True)
        self.temporary = tempfile.TemporaryDirectory(prefix="fused-diffusion-gpu-")
        self.site = Path(self.temporary.name, "site")
        self.site.mkdir()
        paths = [str(self.site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "GPU_RUN_SITE": str(self.site),
            **{name: str(Path(self.temporary.name, folder)) for name, folder in caches.items()},
        }

    def run(self, parts: Sequence[Part]) -> int:
        """0 where every part passed, else 1. Writes a line per part to gpu.jsonl; prints the summary."""
        stopped, pending = None, list(parts)

        def interrupt(number: int, frame: object) -> None:
            raise KeyboardInterrupt(signal.Signals(number).name)

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while pending:
                if pending[0].timed and self.behind is not None:
                    self._finish(self.behind)
                    self.behind = None
                part, left = pending.pop(0), self.end - time.monotonic()
                if stopped is not None or left < min(LEAST, part.limit):
                    self._status(part, "not run", [stopped or "no time was left"], 0.0)
                    continue
                attempt = Attempt(part, min(part.limit, left))
                if part.background:
                    self.behind = attempt
                    self._launch(attempt)
                    continue
                self.current = attempt
                self._launch(attempt)
                passed = self._finish(attempt)
                self.current = None
                if part.essential and not passed:
                    stopped = f"{part.name} did not pass"
            if self.behind is not None:
                self._finish(self.behind)
                self.behind = None
        except KeyboardInterrupt as signalled:
            for number in before:
                signal.signal(number, signal.SIG_IGN)  # the summary is still to be written
            self._interrupted(f"interrupted by {signalled}", pending)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.temporary.cleanup()
        text = summary.text(results.read(self.file))
        (self.out / "summary.txt").write_text(text)
        print(text, end="", flush=True)
        statuses = [row["status"] for row in results.read(self.file) if "status" in row]
        return 0 if statuses and all(status == "passed" for status in statuses) else 1

    def _interrupted(self, reason: str, pending: list[Part]) -> None:
        for attempt in filter(None, (self.current, self.behind)):
            if attempt.process is not None:
                attempt.process.stop()
                self._keep(attempt)
            seconds = time.monotonic() - attempt.begun
            self._status(attempt.part, "failed", [*attempt.failures, reason], seconds)
        for part in pending:
            self._status(part, "not run", [reason], 0.0)

    # ---- One part.

    def _launch(self, attempt: Attempt) -> None:
        part = attempt.part
        progress = Path(self.temporary.name, f"{part.name}.progress")
        progress.unlink(missing_ok=True)
        words = [part.module or f"benchmarks.gpu.{part.name}", "--part", part.name, "--out", str(self.out)]
        words += ["--progress", str(progress), "--start", str(attempt.start)]
        words += ["--dry-run"] if self.dry_run else []
        command = words if self.fork else [sys.executable, "-m", "benchmarks.gpu.worker", *words]
        attempt.seen, attempt.seen_at = None, time.monotonic()
        attempt.process = Process(command, self.environment, ROOT, self.fork)

    def _finish(self, attempt: Attempt) -> bool:
        """Waits for a part to end, and writes its status."""
        while self._watch(attempt):
            if self.behind is not None and self.behind is not attempt:
                self._watch(self.behind)
            time.sleep(PAUSE)
        part, failures = attempt.part, attempt.failures
        passed = not failures or (part.background and attempt.done > 0)
        seconds = time.monotonic() - attempt.begun
        self._status(part, "passed" if passed else "failed", failures, seconds, attempt.cpu)
        return passed

    def _watch(self, attempt: Attempt) -> bool:
        """Polls a part once: whether it goes on. After a failed job it does, with the next one."""
        if attempt.over:
            return False
        process, now = attempt.process, time.monotonic()
        status = process.poll()
        progress = self._progress(attempt.part)
        if progress != attempt.seen:
            attempt.seen, attempt.seen_at = progress, now
        number, count, job = progress or (None, 0, "the beginning")
        running = status is None
        late, stalled = now > attempt.end, now - attempt.seen_at > attempt.part.job_limit
        if running and not late and not stalled:
            return True
        if running:
            process.stop()
        written = len(attempt.failures)
        self._take_errors(attempt)
        if running and late:
            rest = f"; {count - number - 1} jobs not begun" if progress else ""
            attempt.failures.append(f"{job}: killed, the part's {attempt.seconds:.0f} s were over{rest}")
        elif running:
            attempt.failures.append(f"{job}: killed after {attempt.part.job_limit:.0f} s")
        elif status < 0:
            attempt.failures.append(f"{job}: killed by signal {-status}")
        elif status > 0 and len(attempt.failures) == written:
            attempt.failures.append(f"{job}: ended with status {status}")
        self._keep(attempt)
        attempt.over = status == 0 or number is None or number + 1 >= count or late
        if number is not None:
            attempt.done += (count if status == 0 else number) - attempt.start
        if not attempt.over:
            attempt.start = number + 1
            self._launch(attempt)
        return not attempt.over

    def _progress(self, part: Part) -> tuple | None:
        try:
            return tuple(json.loads(Path(self.temporary.name, f"{part.name}.progress").read_text()))
        except (OSError, ValueError):
            return None

    def _take_errors(self, attempt: Attempt) -> None:
        """The messages of its workers about failed jobs."""
        name = attempt.part.name
        rows = [row for row in results.read(self.file) if row.get("part") == name and "error" in row]
        for row in rows[attempt.errors :]:
            attempt.failures.append(f"{row['job'] or 'the beginning'}: {row['error']}")
        attempt.errors = len(rows)

    def _keep(self, attempt: Attempt) -> None:
        """The output of its process, and the resources used."""
        attempt.cpu += attempt.process.cpu
        with open(self.log, "a") as file:
            file.write(f"==== {attempt.part.name}, from job {attempt.start}\n{attempt.process.output()}\n")

    def _status(self, part: Part, status: str, failures: list[str], seconds: float, cpu: float = 0.0) -> None:
        values = {"status": status, "seconds": round(seconds, 1), "cpu": round(cpu, 1), "failures": failures}
        results.append(self.file, part=part.name, **values)
        print(f"{part.name}: {status}, {seconds:.0f} s", *(f[:200] for f in failures[:1]), flush=True)
