"""The benchmark of a run's snapshots: its points are those of `diffusion evaluate`."""

import csv
import json
import sys

import pytest
import torch
from PIL import Image

import diffusion
from diffusion.classifier import Classifier, balanced_labels, measure_reference, save_classifier
from diffusion.classifier.network import ClassifierConfig
from diffusion.data import ImageSet
from diffusion.evaluation.accuracy import evaluate
from helpers.paths import ROOT

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks import snapshots


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two snapshots of a run, of batches of 32 images, and a classifier of their images."""
    where = tmp_path_factory.mktemp("snapshots")
    config = diffusion.UNetConfig(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        channels=8,
        channel_mult=(1, 2),
        norm_groups=4,
        num_classes=2,
    )
    for step in (10, 25):
        torch.manual_seed(step)
        metadata = {"training": {"step": step, "batch_size": 32}}
        schedule = diffusion.NoiseSchedule.linear()
        diffusion.DDPM(diffusion.UNet(config), schedule, metadata=metadata).save(where / str(step))
    torch.manual_seed(0)
    judge = Classifier(ClassifierConfig(3, 16, 2, 4, 8, "residual")).eval()
    images = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    real = ImageSet(images, balanced_labels(60, 2), None, "noise")
    save_classifier(where / "judge", judge, measure_reference(judge, real, real, 20), {})
    return where


def test_points_are_those_of_evaluate(folders, tmp_path, capsys):
    words = ["--out", str(tmp_path / "a.png"), "--classifier", str(folders / "judge"), "--num", "20"]
    words += ["--steps", "2", "--sampler", "ddim"]
    snapshots.main([str(folders / "25"), str(folders / "10"), *words])
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["images"] for row in rows] == ["320", "800"]
    expected = evaluate(
        diffusion.load(folders / "10"), num=20, steps=2, sampler="ddim", classifier=folders / "judge"
    )
    assert float(rows[0]["accuracy"]) == expected["class_accuracy"]["accuracy"]
    assert float(rows[0]["distance"]) == pytest.approx(expected["frechet"]["distance"], rel=1e-4)
    assert float(rows[0]["real"]) == expected["frechet"]["real"]["balanced"]["distance"]
    assert Image.open(tmp_path / "a.png").size[0] > 400
    capsys.readouterr()
    before = (tmp_path / "a.csv").read_text()
    snapshots.main([str(folders / "10"), *words])
    assert capsys.readouterr().out == f"{folders / '10'}: measured before\n"
    assert (tmp_path / "a.csv").read_text() == before
    assert {row["protocol"] for row in rows} == {rows[0]["protocol"]}
    assert rows[0]["protocol"].startswith("20 samples, guidance 2, ddim, 2 steps, exact, classifier ")
    with pytest.raises(SystemExit):
        snapshots.main([str(folders / "10"), *words, "--guidance-scale", "5"])
    assert "holds points of another protocol: 20 samples, guidance 2," in capsys.readouterr().err


def test_two_averages_of_one_moment(folders, tmp_path):
    model = diffusion.load(folders / "10")
    with torch.no_grad():
        next(model.unet.parameters()).mul_(1.5)
    model.save(tmp_path / "ema", **model.metadata)
    words = ["--out", str(tmp_path / "a.png"), "--classifier", str(folders / "judge"), "--num", "20"]
    snapshots.main([str(folders / "10"), str(tmp_path / "ema"), *words, "--steps", "2"])
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["images"] for row in rows] == ["320", "320"]
    assert rows[0]["weights"] != rows[1]["weights"]


@pytest.mark.parametrize("case", ["no run", "no models", "not png", "damaged", "absurd", "not text"])
def test_mistakes_end_in_one_line(folders, tmp_path, capsys, case):
    words = [str(folders / "10"), "--out", str(tmp_path / "a.png")]
    if case == "no run":
        config = json.loads((folders / "10" / "config.json").read_text())
        (tmp_path / "m").mkdir()
        config["metadata"] = {}
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        weights = (folders / "10" / "model.safetensors").read_bytes()
        (tmp_path / "m" / "model.safetensors").write_bytes(weights)
        words[0], message = str(tmp_path / "m"), "no step and batch_size"
    elif case == "no models":
        words, message = words[1:], "there is no MODEL to measure"
    elif case == "not png":
        words[2], message = str(tmp_path / "a.jpg"), "--out must end in .png"
    else:
        table = {"damaged": "images,loss\n1,2\n", "not text": b"\xff\xfe"}.get(case)
        if table is None:
            table = ",".join(snapshots.Point._fields) + "\n-5,nan,-1,inf,a,b\n"
        (tmp_path / "a.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
        message = "a.csv is no table of this command"
    with pytest.raises(SystemExit) as error:
        snapshots.main(words)
    assert error.value.code == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1
