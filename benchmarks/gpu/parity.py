"""The tests of the kernels on a device, and of whole chains: every result against the reference.

As "triton", those of the Triton kernels in bfloat16 alone: compiling them for every dtype takes minutes.
As "wgmma", those of attention by wgmma, which may hang.
"""

import importlib.util
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from .part import Finding, Job, Run

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests" / "kernels"
SELECTIONS = {
    "parity": ("not triton and not wgmma", 8),
    "wgmma": ("wgmma", 0),
    "triton": ("triton and not torch.float32 and not torch.float16", 16),
}
OFTEN = 5.0  # seconds between two lines about the progress of the tests
FAILURES = 40  # number of failures that are written down


def jobs(run: Run) -> list[Job]:
    return [("tests", lambda: tests(run))]


class Reporter:
    """A pytest plugin: writes each failure at once, and the numbers of passed, skipped and failed tests."""

    def __init__(self, run: Run):
        self.run, self.counts, self.reasons = run, Counter(), Counter()
        self.written = time.monotonic()

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome == "passed" and report.when != "call":
            return
        self.counts[report.outcome] += 1
        if report.outcome == "skipped":
            self.reasons[_reason(report)] += 1
        if report.outcome == "failed" and self.counts["failed"] <= FAILURES:
            self.run.record(test=report.nodeid, reason=_reason(report))
        if time.monotonic() - self.written > OFTEN:
            self.write("so far")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.counts["failed"] += 1
            self.run.record(test=report.nodeid, reason=_reason(report))

    def write(self, when: str) -> None:
        self.written = time.monotonic()
        self.run.record(when=when, counts=dict(self.counts), skips=dict(self.reasons.most_common(10)))


def _reason(report: Any) -> str:
    """One line: the reason why a test was skipped, or the place and error of its failure."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])[:300]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else str(report.longrepr)
    return " ".join(text.split())[:300]


def tests(run: Run) -> None:
    import pytest

    selection, processes = SELECTIONS[run.part]
    selection += " and test_value" if run.dry_run else ""
    reporter = Reporter(run)
    with tempfile.TemporaryDirectory() as folder:
        words = ["-o", "addopts=", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-k", selection]
        words += ["--basetemp", str(Path(folder, "tests")), "--rootdir", str(ROOT)]
        if importlib.util.find_spec("xdist") is not None:
            words += ["-n", "0" if run.dry_run else str(min(processes, os.cpu_count() or 1))]
        status = pytest.main([*words, str(TESTS / "test_gpu.py")], plugins=[reporter])
    reporter.write("finished")
    failed, passed = reporter.counts["failed"], reporter.counts["passed"]
    skipped = reporter.counts["skipped"]
    if failed or int(status) != 0:
        raise Finding(f"{failed} tests failed, {passed} passed, {skipped} were skipped")
    if not (skipped if run.dry_run else passed):
        raise Finding(f"no test ran: {skipped} were skipped")
