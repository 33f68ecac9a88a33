"""`diffusion evaluate` with a reference: what it writes, and what it refuses before it samples."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import DDPM
from diffusion.classifier import load_classifier
from diffusion.cli import evaluate, main
from diffusion.evaluation.features import Features, load_features
from diffusion.evaluation.guidance_sweep import save_sweep, sweep
from diffusion.storage.images import save_npz
from diffusion.utils.frechet import frechet_distance, moments
from helpers.digits import DATA, FakeModel, read_digits, real_digits
from helpers.models import make_model

pytest.importorskip("torch_fidelity", reason="the metrics are torch-fidelity's", exc_type=ImportError)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "fid", "nonsense"], "unknown metric 'nonsense'"),
        (["--metrics", "fid", "--num", "1"], "fid needs at least 2 samples, not 1"),
        (["--metrics", "precision-recall", "--num", "3"], "precision-recall needs at least 4 samples, not 3"),
        (["--features", "cifar10-classifier", "--metrics", "fid"], "takes images [3, 32, 32], not [3, 8, 8]"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_told_before_the_sampling(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_model(channels=3).save("model")
    np.savez("a.npz", images=np.zeros((9, 8, 8, 3), np.uint8))
    judge = Features("judge", "0" * 64, None, lambda x: (x.flatten(1).float(), x.flatten(1).float()))
    if "--features" not in words:
        monkeypatch.setattr("diffusion.cli.evaluate.load_features", lambda name: judge)
    monkeypatch.setattr(DDPM, "sample", lambda *_, **__: pytest.fail("it sampled"))
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--model", "model", "--reference", "a.npz", *words])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_an_unknown_metric_is_told_before_features_are_fetched(monkeypatch, capsys):
    monkeypatch.setattr("diffusion.cli.evaluate.load_features", lambda name: pytest.fail("it fetched"))
    with pytest.raises(SystemExit):
        main(["evaluate", "--samples", "a.npz", "--reference", "b.npz", "--metrics", "fid", "--metrics", "x"])
    assert "unknown metric 'x'" in capsys.readouterr().err


def test_a_curve_that_cannot_be_drawn_is_told_before_the_sampling(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DDPM, "sample", lambda *_, **__: pytest.fail("it sampled"))
    (tmp_path / "a.png").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--sweep", "--out", "a.json"])
    assert caught.value.code == 2
    assert "cannot write a.png: it is a folder" in capsys.readouterr().err
    model = FakeModel(real_digits)
    model.steps = make_model(T=30).steps
    with pytest.raises(ValueError, match=r"steps must be a whole number in 1\.\.30, not 50"):
        sweep(model, num=20)
    assert model.calls == []


def test_the_command_compares_and_writes(tmp_path, capsys):
    digits, _ = read_digits(DATA, "test")
    for name, part in (("a", digits[:128]), ("b", digits[128:])):
        save_npz(part.float() / 127.5 - 1, tmp_path / f"{name}.npz")
    words = ["evaluate", "--samples", str(tmp_path / "a.npz"), "--reference", str(tmp_path / "b.npz")]
    main([*words, "--features", "classifier", "--metrics", "fid", "--out", str(tmp_path / "r.json")])
    assert "frechet_distance_in_mnist-classifier_features" in capsys.readouterr().out
    result = json.loads((tmp_path / "r.json").read_text())
    features = load_features("classifier")
    expected = frechet_distance(
        *moments(features.of(digits[:128])[0]), *moments(features.of(digits[128:])[0])
    )
    assert list(result["metrics"].values()) == [pytest.approx(expected, rel=1e-6)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--samples", "a.npz"], "--reference is missing"),
        (["--bits-per-dim"], "--reference is missing"),
        (["--sweep"], "--out is missing"),
        (["--sweep", "--out", "a.txt"], "must end in .json"),
        (["--reference", "none.npz", "--features", "classifier"], "there is no none.npz"),
        (["--reference", "none", "--features", "classifier"], "no data set, folder or zip 'none'"),
        (["--reference", "mnist", "--features", "classifier"], "mnist needs --data-dir"),
        (["--num", "0"], "--num"),
    ],
)
def test_what_is_missing_is_told(words, expected, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *words])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "measure", [["--sweep"], ["--bits-per-dim"], ["--samples", "a"], ["--reference", "a"], []]
)
def test_an_option_without_effect_is_refused(measure, capsys, tmp_path, monkeypatch):
    """Each option is used, or refused in one line that names it."""
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    of_pairs, of_model = "reference split resize metrics features data-dir", "model num seed device"
    sampling = f"{of_model} guidance-scale sampler steps batch-size precision dtype backend"
    used = {
        "--sweep": f"{of_model} batch-size precision dtype backend classifier",
        "--bits-per-dim": f"{of_model} reference split resize data-dir",
        "--samples": f"{of_pairs} samples",
        "--reference": f"{of_pairs} {sampling} samples",  # with both, --samples decides
        "": f"{sampling} data-dir classifier reference samples",  # the last two choose another measure
    }[measure[0] if measure else ""].split()
    options = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
    for option in {*options} - {"--help", "--out", "--sweep", "--bits-per-dim"}:
        if option[2:] in used:
            continue
        value = "1" if option in ("--num", "--guidance-scale", "--steps", "--seed", "--batch-size") else "fid"
        with pytest.raises(SystemExit) as caught:
            main(["evaluate", *measure, option, *([] if option == "--resize" else [value])])
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        where = f"with {measure[0]}" if measure else "without --reference"
        assert line == f"diffusion: {option} has no effect {where}: leave it out"


def test_two_measures_are_refused(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--sweep", "--bits-per-dim"])
    assert caught.value.code == 2
    assert "--sweep and --bits-per-dim are different measures" in capsys.readouterr().err


def test_the_curve_has_every_point(tmp_path):
    """The stand-in gives real digits for all options: distances are small, class accuracy is 100 %."""
    model = FakeModel(real_digits)
    result = sweep(
        model, num=40, samplers=("ddim", "dpm++"), steps=(2, 5), guidance=(1.0, 3.0), precision="fast"
    )
    points = [(p["sampler"], p["steps"], p["guidance"]) for p in result["points"]]
    one = [(2, 1.0), (5, 1.0), (5, 3.0)]
    assert points == [(sampler, *rest) for sampler in ("ddim", "dpm++") for rest in one]
    assert [p["evaluations"] for p in result["points"]] == [2, 5, 5, 2, 5, 5]
    assert min(p["accuracy"] for p in result["points"]) >= 0.95
    _, reference = load_classifier()
    features = load_features("classifier").of(
        ((real_digits([i % 10 for i in range(40)], 1) + 1) * 127.5).round().to(torch.uint8)
    )[0]
    expected = frechet_distance(*moments(features), reference.mean, reference.cov)
    assert result["points"][0]["distance"] == pytest.approx(expected, rel=1e-9)
    protocol = result["protocol"]
    assert protocol["feature network's SHA-256"] == load_features("classifier").sha256
    assert (protocol["number of samples"], protocol["EMA decay"], protocol["precision"]) == (40, 0.99, "fast")
    assert protocol["labels"] == "each class in turn"
    save_sweep(result, tmp_path / "curve.json")
    assert json.loads((tmp_path / "curve.json").read_text()) == result
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (1000, 400)
    result["protocol"]["distance"] += os.fsdecode(b" in c\xe9")  # the name of a classifier's folder
    save_sweep(result, tmp_path / "other.json")
    assert json.loads((tmp_path / "other.json").read_text()) == result


def test_bits_per_dimension_by_the_command(tmp_path, capsys):
    make_model(T=5, channels=3).save(tmp_path / "model")
    pixels = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    save_npz(pixels.float() / 127.5 - 1, tmp_path / "a.npz")
    words = ["evaluate", "--model", str(tmp_path / "model"), "--bits-per-dim", "--reference"]
    main([*words, str(tmp_path / "a.npz"), "--num", "3", "--out", str(tmp_path / "r.json")])
    output = capsys.readouterr().out
    assert "on 3 images" in output
    assert "without labels, seed 0, EMA decay not known" in output
    assert json.loads((tmp_path / "r.json").read_text())["images"] == 3
