"""`python -m benchmarks.sampler_curve`: its steps, its points and how they are added to; refusals."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffusion.process.schedule import NoiseSchedule
from diffusion.samplers import SAMPLERS, heun
from helpers.models import make_model
from helpers.paths import ROOT

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks import sampler_curve


def test_every_sampler_has_a_curve():
    assert {sampler for sampler, _ in sampler_curve.CURVES.values()} == set(SAMPLERS)
    for sampler, options in sampler_curve.CURVES.values():
        assert len(SAMPLERS[sampler](NoiseSchedule.cosine(), 5, spacing="trailing", **options))


@pytest.mark.parametrize("count", [1, 5, 8, 20])
def test_heun_takes_no_more_evaluations_than_asked_for(count):
    steps = sampler_curve.steps_for("heun", count)
    rows = [len(heun(NoiseSchedule.cosine(), n, spacing="trailing")) for n in (steps, steps + 1)]
    assert rows[0] <= count < rows[1]
    assert sampler_curve.steps_for("ddim", count) == count


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A model, and a stand-in for `sweep` whose distance is 10 / steps; gives the options of each call."""
    make_model(10, channels=1).save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    calls = []

    def sweep(model, *, samplers, steps, guidance, num, **options):
        calls.append(options)
        points = [
            {"sampler": samplers[0], "steps": n, "evaluations": n, "guidance": 1.0, "distance": 10 / n}
            for n in steps
        ]
        protocol = {"number of samples": num} | {k: v for k, v in options.items() if k == "solver_order"}
        return {"points": points, "protocol": protocol}

    monkeypatch.setattr(sampler_curve, "sweep", sweep)
    return calls


def run(*words):
    sampler_curve.main(["--model", "model", "--out", "curve.json", *map(str, words)])


def test_calls_add_to_the_points(measured, capsys):
    run("--curves", "ddim", "dpm++, order 3", "--evaluations", 5, 8)
    run("--curves", "ddim", "--evaluations", 8, 4)
    result = json.loads(Path("curve.json").read_text())["model"]
    points = [(p["curve"], p["steps"], p["distance"]) for p in result["points"]]
    ddim = [("ddim", n, 10 / n) for n in (4, 5, 8)]
    assert points == [*ddim, ("dpm++, order 3", 5, 2.0), ("dpm++, order 3", 8, 1.25)]
    assert measured[1]["solver_order"] == 3
    assert result["real images"] == pytest.approx(0.1515, abs=1e-3)  # of 1,000, as docs/evaluation.md says
    assert "ddim" in capsys.readouterr().out
    with Image.open("curve.png") as picture:
        assert picture.size == (800, 500)


def test_points_of_another_protocol_are_kept(measured, capsys):
    run("--curves", "ddim", "--evaluations", 5)
    before = Path("curve.json").read_text()
    for words, message in (
        (["--num", 500], "points of another protocol; choose another name"),
        (["--curves", "euler"], "unknown curve 'euler'"),
        (["--evaluations", 0], "--evaluations must be"),
        (["--out", "curve.txt"], "--out must end in .json"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run(*words)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert Path("curve.json").read_text() == before
