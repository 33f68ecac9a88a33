"""The noise schedules against diffusers' betas, the paper's rescaling, and their refusal of nonsense."""

import json
import math

import diffusers
import numpy as np
import pytest
import torch

from diffusion.process.schedule import NoiseSchedule

KINDS = {
    "linear": (NoiseSchedule.linear, {"beta_schedule": "linear"}),
    "scaled_linear": (
        NoiseSchedule.scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (NoiseSchedule.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    "sigmoid": (NoiseSchedule.sigmoid, {"beta_schedule": "sigmoid"}),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


@kinds
@pytest.mark.parametrize("T", [1, 2, 10, 1000, 4000])
def test_betas_are_those_of_diffusers(kind, T):
    make, config = KINDS[kind]
    schedule = make(T)
    theirs = diffusers.DDPMScheduler(T, **config).betas
    assert schedule.T == T
    assert schedule.betas.dtype == schedule.alphas.dtype == schedule.alphas_cumprod.dtype == torch.float64
    # float32 has 24 bits, and diffusers rounds a few times
    torch.testing.assert_close(schedule.betas, theirs.double(), rtol=8 * 2**-24, atol=0)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (NoiseSchedule.linear, {"beta_schedule": "linear"}),
        (NoiseSchedule.scaled_linear, {"beta_schedule": "scaled_linear"}),
        (NoiseSchedule.sigmoid, {"beta_schedule": "sigmoid"}),
    ],
)
def test_beta_start_and_end(make, config):
    theirs = diffusers.DDPMScheduler(50, beta_start=0.002, beta_end=0.3, **config).betas
    ours = make(50, beta_start=0.002, beta_end=0.3).betas
    torch.testing.assert_close(ours, theirs.double(), rtol=8 * 2**-24, atol=0)


def test_cosine_is_the_formula_of_the_paper():
    # Nichol & Dhariwal 2021, eq. 17: alphas_cumprod(t) = f(t) / f(0)
    def f(u):
        return math.cos((u + 0.05) / 1.05 * math.pi / 2) ** 2

    schedule = NoiseSchedule.cosine(20, s=0.05, max_beta=0.8)
    expected = [f(i / 20) / f(0) for i in range(1, 21)]
    np.testing.assert_allclose(schedule.alphas_cumprod[:18], expected[:18], rtol=1e-12)
    assert schedule.betas[-1] == 0.8


def test_the_tables_follow_from_the_betas():
    schedule = NoiseSchedule.from_betas([0.1, 0.2, 0.5])
    assert schedule.alphas.tolist() == pytest.approx([0.9, 0.8, 0.5], rel=1e-15)
    assert schedule.alphas_cumprod.tolist() == pytest.approx([0.9, 0.72, 0.36], rel=1e-15)


@kinds
@pytest.mark.parametrize("T", [2, 10, 1000])
def test_rescaling_to_zero_terminal_snr(kind, T):
    make, config = KINDS[kind]
    before, after = make(T), make(T).rescale_zero_terminal_snr()
    root, rescaled = before.alphas_cumprod.sqrt(), after.alphas_cumprod.sqrt()
    assert after.alphas_cumprod[-1] == 0
    assert after.betas[-1] == 1
    assert rescaled[0].item() == pytest.approx(root[0].item(), rel=1e-12)
    # Lin et al. 2023, algorithm 1: an affine map of sqrt(alphas_cumprod)
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    torch.testing.assert_close(rescaled, expected, rtol=1e-9, atol=1e-12)
    theirs = diffusers.DDPMScheduler(T, rescale_betas_zero_snr=True, **config)
    # diffusers subtracts nearly equal float32 numbers
    torch.testing.assert_close(rescaled, theirs.alphas_cumprod.double().sqrt(), rtol=0, atol=1e-5)


def test_rescaling_twice_is_rescaling_once():
    once = NoiseSchedule.linear().rescale_zero_terminal_snr()
    twice = once.rescale_zero_terminal_snr()
    torch.testing.assert_close(twice.betas, once.betas, rtol=1e-9, atol=0)
    assert twice.to_config() == once.to_config()


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(7, beta_start=0.01, beta_end=0.3),
        NoiseSchedule.scaled_linear(),
        NoiseSchedule.cosine(100, s=0.01, max_beta=0.99),
        NoiseSchedule.sigmoid(10),
        NoiseSchedule.from_betas([1 / 3, 0.5, 1.0]),
        NoiseSchedule.linear().rescale_zero_terminal_snr(),
        NoiseSchedule.from_betas([1 / 3, 0.5, 0.7]).rescale_zero_terminal_snr(),
    ],
    ids=lambda schedule: schedule.to_config()["kind"],
)
def test_configuration_round_trip(schedule):
    config = json.loads(json.dumps(schedule.to_config()))
    again = NoiseSchedule.from_config(config)
    assert torch.equal(again.betas, schedule.betas)
    assert again.to_config() == config


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_betas_of_any_sequence(make):
    betas = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    assert torch.equal(NoiseSchedule.from_betas(make([0.25, 0.5, 0.75])).betas, betas)


def test_numbers_of_numpy_and_torch():
    schedule = NoiseSchedule.linear(np.int64(10), np.float32(0.125), torch.tensor(0.25))
    assert schedule.to_config() == {"kind": "linear", "T": 10, "beta_start": 0.125, "beta_end": 0.25}
    assert json.loads(json.dumps(schedule.to_config())) == schedule.to_config()


def test_the_schedule_does_not_share_memory_with_its_betas():
    betas = torch.tensor([0.25, 0.5], dtype=torch.float64)
    schedule = NoiseSchedule.from_betas(betas)
    betas[0] = 7
    assert schedule.betas[0] == 0.25
    with pytest.raises(AttributeError):
        schedule.betas = betas


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([], "at least one number"),
        ([[0.1, 0.2]], "list of finite numbers"),
        (0.1, "list of numbers"),
        ([True, 0.5], "list of finite numbers, not True"),
        ([0.5, 10**400], "list of finite numbers, not 1000"),
        ([0.5, "0.6"], "list of finite numbers, not '0.6'"),
        (torch.tensor([True]), "list of finite numbers, not True"),
        (torch.tensor([0.1j]), "list of finite numbers, not"),
        (torch.zeros(3, device="meta"), "list of numbers"),
        (b"\0", "list of numbers"),
        ([0.0, 0.5], r"\(0, 1\]"),
        ([-0.1, 0.5], r"\(0, 1\]"),
        ([0.5, 1.5], r"\(0, 1\]"),
        ([0.5, math.nan], "list of finite numbers, not nan"),
        ([0.5, 1.0, 0.5], "fall at every timestep"),
        ([1e-17, 0.5], "fall at every timestep"),
        ([0.999] * 200, "fall at every timestep"),
        (["a"], "list of finite numbers"),
        (torch.full((1_000_001,), 1e-9), r"T must be a whole number in 1\.\.1000000"),
        (None, "list of numbers"),
    ],
)
def test_wrong_betas(betas, message):
    with pytest.raises(ValueError, match=message):
        NoiseSchedule.from_betas(betas)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (NoiseSchedule.linear, {"T": 0}, r"T must be a whole number in 1\.\.1000000, not 0"),
        (NoiseSchedule.linear, {"T": 10**400}, r"T must be a whole number in 1\.\.1000000, not 1000"),
        (NoiseSchedule.cosine, {"T": 2**40}, r"T must be a whole number in 1\.\.1000000"),
        (NoiseSchedule.sigmoid, {"beta_end": 10**400}, "beta_end must be a finite number"),
        (NoiseSchedule.linear, {"beta_end": 1e308}, "beta_end must be a finite number, not 1e"),
        (NoiseSchedule.cosine, {"T": -5}, "whole number"),
        (NoiseSchedule.linear, {"T": 10.0}, "whole number"),
        (NoiseSchedule.linear, {"T": True}, "whole number"),
        (NoiseSchedule.linear, {"beta_end": 1.5}, r"\(0, 1\]"),
        (NoiseSchedule.linear, {"beta_start": 0.0}, r"\(0, 1\]"),
        (NoiseSchedule.linear, {"beta_start": math.nan}, "finite"),
        (NoiseSchedule.linear, {"beta_start": "0.1"}, "finite"),
        (NoiseSchedule.scaled_linear, {"beta_start": -0.1}, r"beta_start must be a number in \[0, "),
        (NoiseSchedule.sigmoid, {"beta_end": 2.0}, r"\(0, 1\]"),
        (NoiseSchedule.cosine, {"s": -1.5}, r"s must be a number in \(-1, "),
        (NoiseSchedule.cosine, {"max_beta": 0.0}, r"\(0, 1\]"),
    ],
)
def test_wrong_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


LINEAR = {"kind": "linear", "T": 10, "beta_start": 0.1, "beta_end": 0.2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([], "dictionary"),
        ({}, "unknown kind"),
        ({**LINEAR, "kind": "quadratic"}, "choose from: linear, scaled_linear, .*, betas$"),
        ({**LINEAR, "kind": ["linear"]}, "unknown kind"),
        ({**LINEAR, "gamma": 1.0}, "needs the keys"),
        ({"kind": "linear", "T": 10}, "needs the keys"),
        ({**LINEAR, "T": "10"}, "whole number"),
        ({**LINEAR, "zero_terminal_snr": "yes"}, "true or false"),
        ({"kind": "betas"}, "needs the keys betas, not"),
        ({"kind": "betas", "betas": "abc"}, "list of numbers"),
        ({**LINEAR, "T": 1, "zero_terminal_snr": True}, "at least 2"),
    ],
)
def test_wrong_configurations(config, message):
    with pytest.raises(ValueError, match=message) as error:
        NoiseSchedule.from_config(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("T", [37, 1000])
@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2"])
def test_in_float32_is_what_diffusers_computes(kind, T, zero_snr):
    peer = diffusers.DDPMScheduler(T, beta_schedule=kind, rescale_betas_zero_snr=zero_snr)
    config = {"kind": "cosine" if kind == "squaredcos_cap_v2" else kind, "T": T}
    ends = (
        {"s": 0.008, "max_beta": 0.999}
        if kind == "squaredcos_cap_v2"
        else {"beta_start": 1e-4, "beta_end": 0.02}
    )
    schedule = NoiseSchedule.from_config({**config, **ends, "zero_terminal_snr": zero_snr}).in_float32()
    assert torch.equal(schedule.alphas_cumprod.float(), peer.alphas_cumprod)
    assert schedule.betas.dtype == torch.float64
    assert schedule.to_config()["float32"] is True
    assert torch.equal(NoiseSchedule.from_config(schedule.to_config()).betas, schedule.betas)
    assert torch.equal(schedule.in_float32().betas, schedule.betas)


def test_betas_in_float32():
    betas = [0.1, 0.2, 0.4]
    peer = diffusers.DDPMScheduler(3, trained_betas=betas)
    assert torch.equal(
        NoiseSchedule.from_betas(betas).in_float32().alphas_cumprod.float(), peer.alphas_cumprod
    )
