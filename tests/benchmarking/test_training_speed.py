"""`python -m benchmarks.training_speed`: its numbers against each other and PyTorch's count; refusals."""

import sys

import pytest
import torch

from helpers.paths import ROOT

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks import matrix_rate, training_speed
from benchmarks.flops import flops_of_unet

SMALL = [
    "batch_size=4",
    "unet.channels=8",
    "unet.channel_mult=[1]",
    "unet.num_res_blocks=1",
    "unet.attention_levels=[]",
    "unet.norm_groups=4",
]


def test_the_rate_is_the_work_of_a_step_by_its_time():
    row = training_speed.measure("mnist", SMALL, None, steps=1)
    trainer = training_speed.trainer_of("mnist", SMALL, None)
    assert row["flop"] == 3 * flops_of_unet(trainer.model.unet)
    assert row["images/s"] * row["seconds"] == pytest.approx(4)
    assert row["rate"] == pytest.approx(row["images/s"] * row["flop"])


def test_the_least_time_counts(monkeypatch):
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 23.0])
    monkeypatch.setattr(training_speed.time, "process_time", lambda: next(clock))
    assert training_speed.cpu_seconds(lambda: None, 3) == 2.0


def test_the_command_prints_a_line_for_each_recipe(monkeypatch, capsys):
    threads = torch.get_num_threads()
    monkeypatch.setattr(matrix_rate, "SIZES", (64,))
    command = ["speed", "mnist", "--set", *SMALL, "--dtype", "float32", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", command)
    try:
        training_speed.main()
    finally:
        torch.set_num_threads(threads)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("torch.float32, one thread")
    assert second.startswith("mnist: ")
    assert "images/s" in second
    assert second.endswith("% of the matrix rate")


def test_a_recipe_that_there_is_not_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        training_speed.main()
    assert "nothing" in capsys.readouterr().err
