"""Odd values for everything public that takes a number or a name: a ValueError of one line, at once."""

import argparse
import json
import math
import os
import time
from dataclasses import fields
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusion import NoiseSchedule, UNetConfig, load
from diffusion.cli import main
from diffusion.cli.commands import COMMANDS
from diffusion.samplers import SAMPLERS, own_options
from diffusion.training.recipe import Recipe, changed, load_recipe, recipe_from
from helpers.models import make_model

ODD = st.sampled_from(
    [
        None, True, False, np.True_, 0, -1, 1, 2, 3, 2**31, 2**62, 2**64, 10**30,
        10**400, -(10**400), 10**5000,
        0.0, -0.0, 0.5, 1.5, -1.5, 1e-300, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf,
        "", "3", "nan", "ddim",
        "\n", "ä" * 200, b"3", [], [3], [[3]], (1, 2), {}, {"a": 1}, {3}, 3j, Decimal(3), Fraction(1, 3),
        np.int8(3), np.uint64(2**63), np.float16(0.5), np.float64("nan"), np.array(3), np.array([1, 2]),
        np.array(["x"]), np.array(None), np.zeros((0,)), torch.tensor(3), torch.tensor(0.5),
        torch.tensor([3]),
        torch.tensor(True), torch.tensor(math.inf), torch.tensor(3, device="meta"), torch.zeros(2, 2),
        torch.tensor(3, dtype=torch.uint64), torch.float16, range(3), [True], [1, "x"], [10**400],
        (0, math.inf),
        (1.0, 10**400), [torch.tensor(1), 2], iter([1]), slice(3), Ellipsis,
    ]
)  # fmt: skip
TABLE = [
    *("guidance_scale", "clip", "spacing", "guidance_interval", "prediction_type"),
    *own_options(),
]
SAMPLE = [
    *("labels", "num_samples", "sampler", "steps", "seed", "sample_ids", "batch_size", "noise", "callback"),
    *("backend", "precision", "dtype", "device", "guidance_rescale", "dynamic_threshold"),
    *("dynamic_threshold_max", *TABLE),
]
odd = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def options(names, most=3):
    return st.dictionaries(st.sampled_from(names), ODD, max_size=most)


def one_line(call, *arguments, **named):
    """Calls, and sees to it that nothing but a ValueError of one line comes of it, at once."""
    start, said = time.process_time(), "fine"
    try:
        call(*arguments, **named)
    except ValueError as error:
        said = str(error)
    assert "\n" not in said
    assert 0 < len(said) < 700
    assert time.process_time() - start < 20  # seconds of the processor, for the imports of a first call


@pytest.fixture(scope="module")
def tiny():
    return make_model(10, T=3)


@odd
@given(options(SAMPLE))
def test_sample(tiny, given):
    one_line(tiny.sample, **({"steps": 1, "num_samples": 1} | given))


@odd
@given(st.one_of(st.sampled_from(list(SAMPLERS)), ODD), ODD, options(TABLE))
def test_steps(tiny, sampler, steps, given):
    one_line(tiny.steps, sampler, steps, **given)
    for function in SAMPLERS.values():
        known = {
            name: value for name, value in given.items() if name in ("clip", "spacing", "guidance_scale")
        }
        one_line(function, tiny.schedule, steps, **known)


@odd
@given(options([*(field.name for field in fields(UNetConfig)), "width"]))
def test_unet_configurations(given):
    one_line(UNetConfig.from_dict, given)


@odd
@given(
    st.one_of(st.sampled_from(["linear", "cosine", "sigmoid", "scaled_linear", "betas"]), ODD),
    options(["T", "beta_start", "beta_end", "s", "max_beta", "betas", "zero_terminal_snr"], 4),
)
def test_schedules(kind, given):
    whole = (
        {"T": 10, "s": 0.008, "max_beta": 0.9}
        if kind == "cosine"
        else {"T": 10, "beta_start": 0.1, "beta_end": 0.2}
    )
    whole = {"betas": [0.1]} if kind == "betas" else whole
    one_line(NoiseSchedule.from_config, {"kind": kind} | whole | given)
    one_line(NoiseSchedule.from_config, {"kind": kind} | given)
    one_line(NoiseSchedule.from_betas, given.get("betas"))


@odd
@given(
    options([*(field.name for field in fields(Recipe)), "x"]),
    options([field.name for field in fields(UNetConfig)]),
)
def test_recipes(given, unet):
    one_line(recipe_from, {"unet": unet} | given)


WORDS = st.sampled_from(
    [
        "0",
        "1",
        "-1",
        "3",
        "true",
        "null",
        "[]",
        "{}",
        "[1,2]",
        "NaN",
        "Infinity",
        "-Infinity",
        "1e308",
        "1e400",
        "1e-300",
        "4611686018427387904",
        "ä",
        "--",
        "=",
        "0.5",
        "none",
        "0-9",
        "9-0",
        "0-99999999",
        "conv",
        "ddpm",
        "dpm++",
        "quad",
        "cosine",
        "float16",
        "a.gif",
        "a.npz",
        "a/",
        "nowhere/a.png",
        "/dev/null",
        "mnist",
        "digits",
        "None",
        "(1,",
        "True",
        "",
        "a\nb",
        "9" * 30,
        "9" * 400,
        "9" * 5000,
        "[" * 5000,
    ]
)
FIELDS = [field.name for field in fields(Recipe)]
FIELDS += [f"unet.{name}" for name in ("channels", "channel_mult", "num_res_blocks", "num_classes", "x")]
FIELDS += ["schedule.T", "schedule.kind", "a.b"]


@odd
@given(st.lists(st.tuples(st.sampled_from(FIELDS), WORDS), max_size=3))
def test_changes_of_a_recipe(changes):
    one_line(changed, load_recipe("mnist"), [f"{name}={value}" for name, value in changes])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    make_model(10, T=3).save(folder / "digits")
    before = os.getcwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


BASE = {
    "sample": ["--model", "digits", "--num", "1", "--steps", "1", "--out", "a.png"],
    "train": ["--show"],
    "evaluate": ["--model", "digits"],
    "import": ["x.pt", "--out", "y"],
}


def options_of(command: str) -> list[str]:
    """The options of a command, such as "num"."""
    parser = argparse.ArgumentParser()
    COMMANDS[command].add_arguments(parser)
    found = [word for action in parser._actions for word in action.option_strings if word.startswith("--")]
    return [word[2:] for word in found if word != "--help"]


@odd
@given(st.data())
def test_command_lines(place, capsys, data):
    command = data.draw(st.sampled_from(list(BASE)))
    names = st.sampled_from(options_of(command))
    words = [command, *BASE[command]]
    for name, value, joined in data.draw(st.lists(st.tuples(names, WORDS, st.booleans()), max_size=3)):
        words += [f"--{name}={value}"] if joined else [f"--{name}", value]
    start, status = time.process_time(), 0
    try:
        main(words)
    except SystemExit as end:
        status = end.code
    said = capsys.readouterr().err.splitlines()
    assert status in (0, 2), words
    lines = [line for line in said if line.strip() and "warning:" not in line and "images [" not in line]
    assert len(lines) == (1 if status else 0), (words, lines)
    assert time.process_time() - start < 30, words


@pytest.mark.slow
def test_odd_configurations_of_stored_models(place, tmp_path):
    """Each number of config.json replaced by each odd value that JSON can hold."""
    model = make_model(10, T=3)
    model.save(tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    whole = json.loads(path.read_text())
    odd = [None, True, -1, 10**400, 2**62, 1e308, math.nan, math.inf, "3", [], {}, [[]]]
    places = [(key,) for key in whole] + [(a, b) for a in ("unet", "schedule") for b in whole[a]]
    for keys in places:
        for value in odd:
            config = json.loads(json.dumps(whole))
            target = config[keys[0]] if len(keys) == 2 else config
            target[keys[-1]] = value
            path.write_text(json.dumps(config))
            one_line(load, tmp_path / "m")
