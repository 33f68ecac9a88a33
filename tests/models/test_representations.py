"""The text of a model, a schedule and a step table in a session has the numbers of the object."""

import pytest
import torch

import diffusion
from diffusion import NoiseSchedule
from diffusion.models.description import in_short
from diffusion.process.noise_levels import NoiseLevels
from helpers.models import make_model


def test_a_model():
    model = diffusion.load("mnist")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert 1.35e6 <= count < 1.45e6
    expected = "DDPM(28x28x1, 10 classes, v_prediction, cosine T=1000, 1.4 M parameters, cpu)"
    assert repr(model) == str(model) == expected


def test_a_model_without_classes():
    model = make_model(T=50)
    assert repr(model).startswith("DDPM(8x8x2, no classes, epsilon, linear T=50, ")
    model.unet = None
    assert repr(model) == "DDPM(NoneType, epsilon, linear T=50)"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (999, "999"),
        (1000, "1.0 k"),
        (48_000, "48 k"),
        (1_440_000, "1.4 M"),
        (552_800_000, "553 M"),
        (2e9, "2.0 G"),
    ],
)
def test_numbers_in_short(count, text):
    assert in_short(count) == text


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.linear(),
        NoiseSchedule.cosine(T=10),
        NoiseSchedule.scaled_linear(7, 0.1, 0.25).in_float32(),
        NoiseSchedule.sigmoid(9).rescale_zero_terminal_snr(),
    ],
    ids=lambda schedule: schedule.name,
)
def test_a_schedule_is_the_call_that_makes_it(schedule):
    again = eval(repr(schedule), {"NoiseSchedule": NoiseSchedule})
    assert torch.equal(again.betas, schedule.betas)
    assert again.to_config() == schedule.to_config()


def test_schedules_of_many_numbers_are_one_short_line():
    betas = torch.linspace(0.001, 0.02, 500).tolist()
    shown = repr(NoiseSchedule.from_betas(betas))
    assert shown == "NoiseSchedule.from_betas(500 betas in [0.001, 0.02])"
    levels = NoiseLevels(0.0, 80.0, tuple(range(500, -1, -1)))
    assert repr(levels) == "NoiseLevels(sigma_min=0, sigma_max=80.0, 501 levels)"


def test_a_short_step_table():
    table = make_model().steps("ddim", 4, eta=1.0)
    title, names, *rows = repr(table).splitlines()
    assert title == "StepTable of 4 rows:"
    assert len(rows) == 4
    for i, row in enumerate(rows):
        found = dict(zip(names.split(), row.split(), strict=True))
        assert int(found.pop("row")) == i
        expected = table.row(i)._asdict()
        assert {name: float(text) for name, text in found.items()} == pytest.approx(
            {name: expected.pop(name) for name in found}, rel=1e-5
        )
        assert set(expected.values()) <= {0.0}  # the columns that are left out


def test_a_long_step_table_shows_both_ends():
    table = make_model().steps("ddpm")
    title, _, *rows = repr(table).splitlines()
    assert title == "StepTable of 1,000 rows:"
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3", "4", "...", "997", "998", "999"]
    assert [row.split()[1] for row in rows if "..." not in row] == [
        *("999", "998", "997", "996", "995"),
        *("2", "1", "0"),
    ]
