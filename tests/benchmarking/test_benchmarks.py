"""The sampling benchmark, in small: it times peers that agree, refuses others, and writes its report."""

import json
import sys
from functools import partial

import pytest
import torch
from PIL import Image

from helpers.native import requires_native
from helpers.paths import ROOT

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks import scaling, training
from benchmarks.sampling import models, peers, peers_plot, report, timing


@pytest.fixture(scope="module")
def pair():
    return models.make("mnist")


def test_what_agrees_is_timed(pair, monkeypatch):
    """Timed by a fake clock: on a busy machine two steps may take longer than six."""
    names = ["exact", "reference", "diffusers"]
    times = {(name, steps): 0.5 + 0.1 * steps for name in names for steps in (timing.FIRST, *timing.STEPS)}
    monkeypatch.setattr(timing, "medians", lambda runs, *_: {key: times[key] for key in runs})
    rows = timing.compare(pair, 1, 2.0, "cpu", names, 0.1)
    assert list(rows) == names
    for row in rows.values():
        assert row["difference"] < 1e-4
        assert (row["step"], row["call"]) == (pytest.approx(0.1), pytest.approx(0.5))


def test_what_is_timed_takes_turns():
    calls = []
    found = timing.medians({name: partial(calls.append, name) for name in "ab"}, "cpu", 0.0)
    assert "".join(calls) == "ab" * 4  # a first time that does not count, and three times
    assert set(found) == {"a", "b"}
    assert min(found.values()) >= 0
    assert timing.medians({}, "cpu", 1.0) == {}


def test_what_disagrees_or_fails_is_not_timed(pair, monkeypatch):
    def shifted(*where):
        sample = peers.PEERS["exact"][0](*where)
        return lambda steps: sample(steps) + 0.01

    def missing(*where):
        raise ImportError("No module named 'nonesuch'")

    monkeypatch.setitem(peers.PEERS, "shifted", (shifted, True, ("cpu",)))
    monkeypatch.setitem(peers.PEERS, "missing", (missing, True, ("cpu",)))
    rows = timing.compare(pair, 1, 1.0, "cpu", ["exact", "shifted", "missing"], 0.1)
    assert "step" in rows["exact"]
    assert "step" not in rows["shifted"]
    assert rows["shifted"]["reason"].startswith("wrong by 0.01")
    assert rows["missing"]["reason"] == "ImportError: No module named 'nonesuch'"


def test_cifar10s_network_is_ddpms():
    pair = models.make("cifar10")
    assert sum(p.numel() for p in pair.ours.unet.parameters()) == pytest.approx(35.75e6, rel=1e-3)
    assert pair.flops == pytest.approx(12.4e9, rel=0.01)  # the network's 12.2e9 and its time embedding


@requires_native
def test_the_parts_of_a_step(pair):
    spent = timing.parts(pair, 2, 2.0, "exact", rounds=3)
    assert set(spent) == {*report.PARTS, "network", "chain"}
    assert min(spent.values()) > 0


def test_the_time_of_calls_grows_with_their_steps(pair):
    times = timing.by_steps(pair, 1, "cpu", ["exact"], [1, 40], 0.2)
    assert 0 < times["exact"][0] < times["exact"][1]


def test_the_report(pair, tmp_path):
    rows = {
        "exact": {"step": 0.01, "call": 0.001, "difference": 0.0, "memory": 2**30},
        "diffusers": {"step": 0.03, "call": 0.0, "difference": 0.0},
        "OpenVINO": {"reason": "ModuleNotFoundError: no openvino"},
    }
    where = {"model": "mnist", "mode": "guided", "batch": 8, "flops": 10**8}
    spent = {"convolution": 0.008, "step": 0.0001, "network": 0.0098, "chain": 0.01}
    result = {
        "device": "A Processor, 2 GHz",
        "threads": 2,
        "versions": {"torch": torch.__version__},
        "matrix_rate": {"float32": 1e12, "bfloat16": 2e12},
        "chains": [{**where, "peer": name, **row} for name, row in rows.items()],
        "build": {"simd": "avx2"},
        "parts": [{**where, "precision": "exact", "seconds": spent}],
        "growth": [{"size": 32, "batch": batch, "step": {"exact": 0.01 * batch}} for batch in (1, 2)],
        "steps": {"model": "mnist", "steps": [1, 2], "seconds": {"exact": [0.0102, 0.02]}},
    }
    paths = report.write(result, tmp_path, "cpu")
    assert [path.name for path in paths[:2]] == [
        "sampling-a-processor-2-ghz-2.json",
        "sampling-a-processor-2-ghz-2.md",
    ]
    assert json.loads(paths[0].read_text()) == result
    text = paths[1].read_text()
    # 8 images guided: 16 evaluations of 1e8 FLOPs in 10 ms are 160 GFLOP/s; 8 / (0.001 + 50 * 0.01) images/s.
    assert "| exact | 10.00 | 16% | 16 | 0.8 | 1.00 GiB | 1.00x |  |" in text
    assert "| diffusers | 30.00 | 5% | 5.33 | 0.267 |  | 3.00x |  |" in text
    assert "| OpenVINO | ModuleNotFoundError: no openvino | | | | | | |" in text
    assert (
        "| mnist, guided, batch 8, exact | 8.00 | 0.00 | 0.00 | 0.00 | 0.10 | 9.80 | 10.00 | 2.0% |" in text
    )
    assert "| exact | 10.2 | 20.0 |" in text
    assert "2 threads; avx2; torch" in text
    assert [path.suffix for path in paths[2:]] == [".png", ".png"]


@pytest.fixture(scope="module")
def training_loops():
    """Three loops that train the same network, and one whose loss is of another."""
    names = ["ours, float32", "plain PyTorch loop", "diffusers", "wrong"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(training.LOOPS, "wrong", lambda pair, size, device: lambda: 9.0)
        return training.measure("mnist", 16, "cpu", names, 0.1)


def test_training_loops_agree_and_are_timed(training_loops):
    """The first losses are of the same network: about what noise images and its random targets give."""
    assert training_loops["batch"] == 16
    rows = training_loops["loops"]
    for name in ("ours, float32", "plain PyTorch loop", "diffusers"):
        assert rows[name]["images/s"] == pytest.approx(16 / rows[name]["seconds"])


def test_a_loop_with_another_loss_is_not_timed(training_loops):
    row = training_loops["loops"]["wrong"]
    assert "seconds" not in row
    assert row["reason"]


@pytest.mark.exhaustive
def test_scaling_counts_images_a_second():
    assert scaling.rate(2, 6, ["--steps", "2", "--shard-size", "2"]) > 0


@pytest.mark.exhaustive
def test_a_comparison_in_a_process_of_its_own():
    words = ["--peers", "exact", "diffusers", "--seconds", "0.2", "--compare", "mnist", 1, 2.0]
    found = timing.in_a_process(*words)
    assert set(found["rows"]) == {"exact", "diffusers"}
    assert all(set(row) == {"difference", "step", "call"} for row in found["rows"].values())
    assert set(found["parts"]) == {"exact", "fast"}
    assert timing.peak_memory() > 10**8  # PyTorch alone is more


def test_the_plot_of_the_readme(tmp_path):
    result = next((ROOT / "benchmarks" / "results").glob("sampling-*.json"))
    peers_plot.draw(result, tmp_path / "speed.png")
    assert Image.open(tmp_path / "speed.png").size == (1100, 396)
