"""The run of benchmarks/gpu: what one part does harms no other."""

import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks.gpu import results, wgmma
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.run import Part, Runner

FAULTS = """
import os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.part import Finding

def jobs(run):
    def raises():
        raise ValueError("this job\\nraises")
    def hangs():
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        run.record(child=child.pid)
        time.sleep(600)
    def killed():
        os.kill(os.getpid(), signal.SIGKILL)
    def prints():
        for _ in range(1 << 10):
            print("x" * 1023)
    def finds():
        raise Finding("it is wrong")
    def fine():
        run.record(value=1, process=os.getpid())
    def waits():
        time.sleep(0.5)
        run.record(ended=time.monotonic())
    def begins():
        run.record(began=time.monotonic())
    if run.part == "imports":
        import nonesuch
    known = locals()
    return [(name, known[name]) for name in run.part.split("_")]
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    """faults(parts, seconds) -> exit status, and the lines of gpu.jsonl by part."""
    (tmp_path / "faults.py").write_text(FAULTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(*parts, seconds=60.0):
        out = tmp_path / "out"
        options = {"module": "faults"}
        status = Runner(out, seconds).run([Part(**options | part) for part in parts])
        rows = results.read(out / "gpu.jsonl")
        return status, {part["name"]: [r for r in rows if r["part"] == part["name"]] for part in parts}, out

    return run


def status(rows):
    """The one line that says how a part ended."""
    (row,) = [row for row in rows if "status" in row]
    return row


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_one_part_does_harms_no_other(faults, capfd):
    code, rows, out = faults(
        {"name": "raises_fine", "limit": 20},
        {"name": "hangs_fine", "limit": 3},
        {"name": "killed_fine", "limit": 20},
        {"name": "prints", "limit": 20},
        {"name": "imports", "limit": 20},
        {"name": "fine_hangs_waits", "limit": 20, "job_limit": 3},
        {"name": "fine", "limit": 20},
    )
    assert code == 1
    found = {name: (status(lines)["status"], status(lines)["failures"]) for name, lines in rows.items()}
    assert found == {
        "raises_fine": ("failed", ["raises: ValueError: this job"]),
        "hangs_fine": ("failed", ["hangs: killed, the part's 3 s were over; 1 jobs not begun"]),
        "killed_fine": ("failed", ["killed: killed by signal 9"]),
        "prints": ("passed", []),
        "imports": ("failed", ["the beginning: ModuleNotFoundError: No module named 'nonesuch'"]),
        "fine_hangs_waits": ("failed", ["hangs: killed after 3 s"]),
        "fine": ("passed", []),
    }
    # The jobs after one that failed did run, but for those whose part's time was over.
    values = {name: sum("value" in row for row in lines) for name, lines in rows.items()}
    assert values == {name: int("fine" in name and name != "hangs_fine") for name in rows}
    assert any("ended" in row for row in rows["fine_hangs_waits"])
    for name in ("hangs_fine", "fine_hangs_waits"):
        (child,) = [row["child"] for row in rows[name] if "child" in row]
        assert not is_running(child)
    log = (out / "gpu.log").read_text()
    assert len(log) < 200_000
    assert "this job\nraises" in log
    text = (out / "summary.txt").read_text()
    assert capfd.readouterr().out.endswith(text)
    assert "FAILED  raises_fine" in text
    assert "raises: ValueError: this job" in text


def test_the_exit_status_is_0_where_all_pass(faults):
    code, rows, _ = faults({"name": "fine", "limit": 20}, {"name": "fine_prints", "limit": 20})
    assert code == 0
    assert [status(lines)["status"] for lines in rows.values()] == ["passed", "passed"]


def test_what_is_found_wrong_needs_no_new_process(faults):
    code, rows, _ = faults({"name": "fine_finds_fine_raises_fine_finds", "limit": 20})
    assert code == 1
    (lines,) = rows.values()
    expected = ["finds: it is wrong", "raises: ValueError: this job", "finds: it is wrong"]
    assert status(lines)["failures"] == expected
    first, second, third = (row["process"] for row in lines if "process" in row)
    assert first == second != third


def test_it_stops_where_an_essential_part_fails(faults):
    code, rows, out = faults(
        {"name": "raises", "limit": 20, "essential": True}, {"name": "fine", "limit": 20}
    )
    assert code == 1
    assert status(rows["fine"])["status"] == "not run"
    assert status(rows["fine"])["failures"] == ["raises did not pass"]
    assert "NOT RUN fine" in (out / "summary.txt").read_text()


def test_nothing_begins_when_the_time_is_over(faults):
    code, rows, _ = faults({"name": "waits_hangs", "limit": 20}, {"name": "fine", "limit": 20}, seconds=4.0)
    assert code == 1
    assert status(rows["waits_hangs"])["seconds"] < 8
    assert status(rows["fine"]) | {"cpu": 0.0} == {
        "part": "fine",
        "status": "not run",
        "seconds": 0.0,
        "cpu": 0.0,
        "failures": ["no time was left"],
    }


@pytest.mark.parametrize(
    ("name", "passes"),
    [
        ("waits", True),
        pytest.param("waits_hangs", True, marks=pytest.mark.exhaustive),
        ("hangs_waits", False),
    ],
)
def test_nothing_is_timed_beside_the_background(faults, name, passes):
    code, rows, _ = faults(
        {"name": name, "limit": 3, "background": True},
        {"name": "begins", "limit": 20},
        {"name": "begins_fine", "limit": 20, "timed": True},
    )
    assert (code == 0) == passes
    assert status(rows[name])["status"] == ("passed" if passes else "failed")
    cut = "hangs: killed, the part's 3 s were over; {} jobs not begun"
    failures = {"waits": [], "waits_hangs": [cut.format(0)], "hangs_waits": [cut.format(1)]}
    assert status(rows[name])["failures"] == failures[name]
    lines = [line for lines in rows.values() for line in lines]
    (timed,) = [row["began"] for row in rows["begins_fine"] if "began" in row]
    if name == "waits":
        assert timed > next(row["ended"] for row in lines if "ended" in row)
    for row in lines:
        assert "child" not in row or not is_running(row["child"])


def test_a_signal_ends_all_and_leaves_a_summary(tmp_path):
    (tmp_path / "faults.py").write_text(FAULTS)
    program = (
        "import sys; from pathlib import Path; from benchmarks.gpu.run import Part, Runner;"
        "parts = [Part(name, 60, module='faults') for name in ('fine', 'hangs', 'begins')];"
        "sys.exit(Runner(Path(sys.argv[1]), 60).run(parts))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", program, str(out)], env=environment)
    end = time.monotonic() + 60
    while not any("child" in row for row in results.read(out / "gpu.jsonl")) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    rows = results.read(out / "gpu.jsonl")
    assert [row["status"] for row in rows if "status" in row] == ["passed", "failed", "not run"]
    assert not is_running(next(row["child"] for row in rows if "child" in row))
    assert "interrupted by SIGTERM" in (out / "summary.txt").read_text()


TESTS = """
import pytest

def test_right(): pass

@pytest.mark.skip(reason="no such backend")
def test_skipped(): pass

def test_wrong(): assert 1 + 1 == 3, "a sum"

def test_triton(): assert False
"""


@pytest.mark.exhaustive
def test_tests_are_counted_with_failures_and_skips(faults, tmp_path):
    (tmp_path / "test_gpu.py").write_text(TESTS)
    module = (
        "from pathlib import Path; from benchmarks.gpu import parity; from benchmarks.gpu.parity import jobs"
    )
    (tmp_path / "few.py").write_text(f"{module}\nparity.ROOT = parity.TESTS = Path(__file__).parent\n")
    code, rows, out = faults({"name": "parity", "module": "few", "limit": 60})
    assert code == 1
    (lines,) = rows.values()
    assert status(lines)["failures"] == ["tests: 1 tests failed, 1 passed, 1 were skipped"]
    (failed,) = [row for row in lines if "test" in row]
    assert failed["test"].endswith("test_gpu.py::test_wrong")
    assert failed["reason"].startswith("AssertionError: a sum")
    (counted,) = [row for row in lines if row.get("when") == "finished"]
    assert counted["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert counted["skips"] == {"Skipped: no such backend": 1}
    assert "parity: test_wrong: AssertionError: a sum" in (out / "summary.txt").read_text()


def test_wheels_serve_the_parts_after_them(faults, tmp_path, monkeypatch):
    name = "nonesuch-1.0"
    wheel = tmp_path / f"{name}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("nonesuch.py", "")
        archive.writestr(
            f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: nonesuch\nVersion: 1.0\n"
        )
        tags = "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{name}.dist-info/WHEEL", tags)
        archive.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("GPU_RUN_WHEELS", str(tmp_path))
    wheels = {"name": "wheels", "module": "benchmarks.gpu.wheels", "limit": 60}
    code, rows, _ = faults(wheels, {"name": "imports", "limit": 20})
    assert status(rows["wheels"])["failures"] == []
    # `imports` fails for another reason: there is no job of its name.
    assert status(rows["imports"])["failures"] == ["the beginning: KeyError: 'imports'"]
    assert code == 1


# ---- All of it.


def gpu_sh(out, *words, **environment):
    command = ["bash", str(ROOT / "benchmarks/gpu.sh"), "--out", str(out), *words]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=out.parent)


@pytest.mark.exhaustive
def test_a_dry_run_goes_through_all_parts(tmp_path):
    pytest.importorskip("diffusers")
    result = gpu_sh(tmp_path / "out", "--dry-run")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = results.read(tmp_path / "out/gpu.jsonl")
    assert len(rows) == len((tmp_path / "out/gpu.jsonl").read_text().splitlines())
    ended = {row["part"]: row["status"] for row in rows if "status" in row}
    assert ended == {part.name: "passed" for part in PARTS}
    text = (tmp_path / "out/summary.txt").read_text()
    assert result.stdout.endswith(text)
    assert len(text.splitlines()) <= 60
    assert len(text) <= 8000
    for part in PARTS:
        assert f"PASSED  {part.name}" in text
        assert any(row["part"] == part.name and "status" not in row for row in rows), part.name
    sampled = {
        (r["precision"], r["guidance"], r["batch"]) for r in rows if r["part"] == "sampler" and "call" in r
    }
    assert sampled == {
        (precision, g, n) for precision in ("fast", "exact") for g in (1.0, 3.0) for n in (1, 2)
    }
    (compared,) = [row for row in rows if "errors" in row]
    assert compared["wrong"] is None
    assert compared["errors"].keys() == wgmma.KERNELS.keys()
    assert "attention by wgmma agrees with float64 (1 of 1 shapes" in text
    assert {row["what"] for row in rows if "tool" in row} == {"ops", "wgmma"}
    timed = {"reverse_step_", "attention", "group_norm_silu", "biased_sum_"}
    assert {row["op"] for row in rows if "op" in row} == timed
    assert {row["way"] for row in rows if "way" in row} == {"eager", "graph", "compiled"}
    assert {row["loop"] for row in rows if "loop" in row} == {"ours", "diffusers"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_it_stops_at_once_without_a_device(tmp_path):
    result = gpu_sh(tmp_path / "out")
    assert result.returncode == 1
    assert "environment: failed" in result.stdout
    assert "torch finds no CUDA device" in result.stdout
    assert f"NOT RUN {PARTS[-1].name}" in result.stdout


def test_wheels_are_looked_for(tmp_path):
    result = gpu_sh(tmp_path / "out", "--wheels", str(tmp_path))
    assert result.returncode == 2
    assert f"argument --wheels: there is no wheel in {tmp_path}" in result.stderr
