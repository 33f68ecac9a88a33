"""`python -m benchmarks.training_curve`: its points against a log and formulas; refusals."""

import csv
import sys

import pytest
from PIL import Image

from helpers.models import make_model
from helpers.paths import ROOT

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks import training_curve
from benchmarks.flops import flops_of_unet
from diffusion.training.log_file import COLUMNS

HEADER = ",".join(COLUMNS) + "\n"
ROWS = "10,0.5,,0.002,1,3\n20,0.25,0.3,0.002,1,6\n"


@pytest.fixture
def run(tmp_path):
    """A run of 4 images a step, with two rows in its log."""
    make_model(channels=3).save(tmp_path / "run", training={"batch_size": 4, "step": 25})
    (tmp_path / "run" / "log.csv").write_text(HEADER + ROWS)
    return tmp_path / "run"


def test_the_points_of_a_log(run, tmp_path):
    training_curve.main([str(run), str(run), "--out", str(tmp_path / "curve.png")])
    with (tmp_path / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[:2] == rows[2:]
    assert [(row["run"], row["step"], row["images"]) for row in rows[:2]] == [
        ("run", "10", "40"),
        ("run", "20", "80"),
    ]
    assert [(row["loss"], row["validation_loss"]) for row in rows[:2]] == [("0.5", ""), ("0.25", "0.3")]
    flop = flops_of_unet(make_model(channels=3).unet)
    assert [float(row["pflop"]) for row in rows[:2]] == pytest.approx(
        [3 * flop * images / 1e15 for images in (40, 80)], rel=1e-5
    )
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (1000, 400)


@pytest.mark.parametrize(
    ("log", "name", "expected"),
    [
        (HEADER, "a.png", "log.csv has no rows yet"),
        ("step\n", "a.png", "log.csv is no log of a training run"),
        (HEADER + "10,x,,0.002,1,3\n", "a.png", "log.csv is damaged in the row of step 10"),
        (HEADER + ROWS, "a.jpg", "--out must end in .png"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(run, tmp_path, capsys, log, name, expected):
    (run / "log.csv").write_text(log)
    with pytest.raises(SystemExit) as stop:
        training_curve.main([str(run), "--out", str(tmp_path / name)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (None, "model is no run of `diffusion train`"),
        ([1, 2], "model is no run of `diffusion train`"),
        ("long", "model is no run of `diffusion train`"),
        ({"batch_size": True, "step": 2}, "model is no run of `diffusion train`"),
        ({"batch_size": -4, "step": 2}, "model is no run of `diffusion train`"),
        ({"batch_size": 10**400, "step": 2}, "model is no run of `diffusion train`"),
        ({"batch_size": 2, "step": 6, "images": 16}, "changed its batch size"),
    ],
)
def test_a_model_without_a_run_is_refused(tmp_path, capsys, training, expected):
    make_model().save(tmp_path / "model", training=training)
    with pytest.raises(SystemExit):
        training_curve.main([str(tmp_path / "model"), "--out", str(tmp_path / "a.png")])
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
