"""Measures during a run: distances of samples to held-out images, and the log for TensorBoard."""

import csv
import os
import signal
from dataclasses import replace

import pytest
import torch
from scipy.linalg import sqrtm

from diffusion.evaluation.features import Features
from diffusion.evaluation.held_out import HeldOutDistance
from diffusion.storage.images import to_uint8
from diffusion.training.state import read_state
from helpers.training import make_trainer, run


def features_of(images):
    """Six numbers of an image, in place of a network's."""
    x = images.double().flatten(1)
    return torch.cat([x[:, :5], x.mean(1, keepdim=True)], 1), None


FEATURES = Features("six", "", None, lambda images: (features_of(images)[0], torch.zeros(len(images), 1)))


def rows(path):
    return [(int(step), float(value)) for step, value in list(csv.reader(path.open()))[1:]]


@pytest.fixture
def no_grids(monkeypatch):
    monkeypatch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)


def test_the_distance_is_that_of_the_formula(tmp_path, no_grids):
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) of samples with the labels of the held-out images."""
    trainer = make_trainer()
    images, labels = trainer.validation
    measure = HeldOutDistance(images, labels, FEATURES)
    model = run(tmp_path / "run", trainer, measure=measure, measure_every=6)
    samples = model.sample(labels, sampler="dpm++", steps=20, guidance_scale=1.0)
    a, b = (features_of(x)[0] for x in (to_uint8(samples), images))
    cov = [torch.cov(x.T).numpy() for x in (a, b)]
    expected = (a.mean(0) - b.mean(0)).square().sum().item() + (cov[0] + cov[1]).trace()
    expected -= 2 * sqrtm(cov[0] @ cov[1]).real.trace()
    found = rows(tmp_path / "run" / "distances.csv")
    assert [step for step, _ in found] == [6, 12]
    assert found[-1][1] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="at least 2 held-out images, not 1"):
        HeldOutDistance(images[:1], labels[:1], FEATURES)
    with pytest.raises(ValueError, match=r"six takes images \[1, 28, 28\], not \[1, 8, 8\]"):
        HeldOutDistance(images, labels, replace(FEATURES, shape=(1, 28, 28)))


def test_a_signal_ends_a_measure_and_resuming_repeats_it(tmp_path, no_grids):
    calls = []

    def measure(model, callback):
        calls.append(model)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        callback(0, None, None)
        return float(len(calls))

    with pytest.raises(KeyboardInterrupt, match="stopped at step 8"):
        run(tmp_path / "run", measure=measure, measure_every=4)
    assert read_state(tmp_path / "run" / "state.safetensors")["step"] == 8
    assert rows(tmp_path / "run" / "distances.csv") == [(4, 1.0)]
    run(tmp_path / "run", resume=True, measure=measure, measure_every=4)
    assert rows(tmp_path / "run" / "distances.csv") == [(4, 1.0), (8, 3.0), (12, 4.0)]


def test_tensorboard_reads_what_the_log_holds(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"measure": lambda model, callback: 2.5, "measure_every": 6, "tensorboard": True}
    run(tmp_path / "run", sample_every=100, **options)
    board = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    log = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    for name in ("loss", "validation_loss", "learning_rate", "gradient_norm"):
        written = [(int(row["step"]), float(row[name])) for row in log if row[name]]
        found = [(event.step, event.value) for event in board.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-5)) for step, value in written], name
    assert [(event.step, event.value) for event in board.Scalars("distance")] == [(6, 2.5), (12, 2.5)]
    assert [event.step for event in board.Images("samples")] == [12]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ValueError, match=r'pip install "fused-diffusion\[tensorboard\]"'):
        run(tmp_path / "run", tensorboard=True)
