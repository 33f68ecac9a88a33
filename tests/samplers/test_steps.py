"""The tables that the samplers write: the papers' coefficients, and no nonsense."""

import math
import warnings

import numpy as np
import pytest
import torch

from diffusion.kernels import StepCoefficients, reverse_step
from diffusion.process.prediction import PREDICTION_TYPES
from diffusion.process.schedule import NoiseSchedule
from diffusion.samplers import SAMPLERS, SpacingWarning, StepTable, ddim, ddpm, dpmpp_2m, options_of
from diffusion.samplers.timesteps import SPACINGS
from helpers.samplers import TESTED, variants

SHAPE = (2, 2, 2, 2)


def test_every_sampler_is_tested():
    assert (
        TESTED.keys() | {"heun", "unipc"} == SAMPLERS.keys()
    )  # test_heun and test_unipc have those of these


def drift(table: StepTable, i: int) -> tuple[float, float]:
    """Coefficients of x and of out in x_next, where nothing is clipped."""
    row = table.row(i)
    return row.coef_x + row.coef_x0 * row.x0_from_x, row.coef_output + row.coef_x0 * row.x0_from_output


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [
        *((NoiseSchedule.cosine(), prediction_type) for prediction_type in PREDICTION_TYPES),
        (NoiseSchedule.linear().rescale_zero_terminal_snr(), "v_prediction"),
    ],
    ids=["epsilon", "sample", "v_prediction", "zero SNR"],
)
def test_the_samplers_are_one_another_where_theory_says_so(schedule, prediction_type):
    options = {"prediction_type": prediction_type, "spacing": "trailing"}
    ancestral = ddpm(schedule, 20, **options)
    # DDIM with eta 1 is ancestral sampling (Song et al. 2021, section 4.1).
    stochastic = ddim(schedule, 20, eta=1.0, **options)
    for i in range(20):
        assert drift(stochastic, i) == pytest.approx(drift(ancestral, i), abs=1e-9)
        assert stochastic.row(i).sigma == pytest.approx(ancestral.row(i).sigma, abs=1e-9)
    # DPM-Solver++ of first order is DDIM, its SDE form ancestral (Lu et al. 2022, section 5 and eq. 19).
    # For its first step, zero SNR is not quite zero.
    deterministic = ddim(schedule, 20, **options)
    for sde, other in ((False, deterministic), (True, ancestral)):
        table = dpmpp_2m(schedule, 20, sde=sde, **options)
        for i in (0, 19) if schedule.alphas_cumprod[-1] > 0 else (19,):
            assert table.row(i).coef_x0_prev == 0
            assert drift(table, i) == pytest.approx(drift(other, i), abs=1e-9)
            assert table.row(i).sigma == pytest.approx(other.row(i).sigma, abs=1e-9)


def test_a_row_of_ddpm_is_the_posterior_of_the_paper():
    # Ho et al. 2020, eq. 7, for t = 2 of three timesteps with betas 1/10, 2/10, 1/2.
    row = ddpm(NoiseSchedule.from_betas([0.1, 0.2, 0.5])).row(0)
    signal, before = 0.9 * 0.8 * 0.5, 0.9 * 0.8
    expected = StepCoefficients(
        timestep=2,
        guidance_scale=1,
        x0_from_x=1 / math.sqrt(signal),
        x0_from_output=-math.sqrt(1 / signal - 1),
        clip_x0=1,
        coef_x=math.sqrt(0.5) * (1 - before) / (1 - signal),
        coef_x0=math.sqrt(before) * 0.5 / (1 - signal),
        coef_x0_prev=0,
        coef_output=0,
        sigma=math.sqrt((1 - before) / (1 - signal) * 0.5),
    )
    assert tuple(row) == pytest.approx(tuple(expected), rel=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
@variants
def test_the_last_step_adds_no_noise(sampler, options, spacing):
    for steps in (1, 2, 7, 300, None):
        table = SAMPLERS[sampler](NoiseSchedule.linear(), steps, spacing=spacing, **options)
        last = table.row(len(table) - 1)
        assert last.sigma == 0
        x, output = torch.ones(SHAPE), torch.ones(2, 2 * (1 + table.learned_variance), 2, 2)
        ends = [
            reverse_step(x, output, last, noise=noise, backend="reference")[0]
            for noise in (torch.zeros(SHAPE), torch.full(SHAPE, math.nan))
        ]
        assert torch.equal(*ends)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("T", [2, 10, 1000])
@pytest.mark.parametrize("zero_snr", [False, True])
@variants
def test_tables_are_finite(sampler, options, zero_snr, T, spacing):
    for make in (
        NoiseSchedule.linear,
        NoiseSchedule.scaled_linear,
        NoiseSchedule.cosine,
        NoiseSchedule.sigmoid,
    ):
        schedule = make(T).rescale_zero_terminal_snr() if zero_snr else make(T)
        for steps in (1, min(T, 7), None):
            table = SAMPLERS[sampler](
                schedule, steps, spacing=spacing, prediction_type="v_prediction", clip=None, **options
            )
            finite = table.table.isfinite()
            assert finite.sum(dim=0).tolist() == [
                0 if name == "clip_x0" else len(table) for name in StepCoefficients._fields
            ]
            assert (table.table[:, StepCoefficients._fields.index("sigma")] >= 0).all()


@pytest.mark.parametrize("sde", [False, True])
def test_dpmpp_where_the_signal_fades_below_its_substitute_for_zero(sde):
    # alphas_cumprod is 2.4e-8 < 2^-24 at the second timestep: lambda must increase all the same.
    schedule = NoiseSchedule.cosine(10_000).rescale_zero_terminal_snr()
    assert 0 < schedule.alphas_cumprod[-2] < 2**-24
    table = dpmpp_2m(schedule, prediction_type="v_prediction", sde=sde)
    alpha = table.table[:, StepCoefficients._fields.index("x0_from_x")]
    assert (alpha > 0).all()
    assert (alpha.diff() > 0).all()
    assert (table.table[:, StepCoefficients._fields.index("coef_x")] <= 1).all()


def test_the_table():
    table = dpmpp_2m(NoiseSchedule.linear(), 3, spacing="trailing", clip=None)
    assert len(table) == 3
    assert table.table.dtype == torch.float64
    assert table.table.shape == (3, 12)
    assert table.timesteps.tolist() == [999, 666, 332]
    assert table.timesteps.dtype == torch.int64
    assert table.row(1) == StepCoefficients(*table.table[1].tolist())
    assert all(type(value) is float for value in table.row(1))
    assert table.row(1).clip_x0 == math.inf
    assert table.needs_x0_prev
    assert not table.learned_variance
    assert not ddpm(NoiseSchedule.linear(), 3).needs_x0_prev
    assert ddpm(NoiseSchedule.linear(), 3, variance="learned_range").learned_variance


def test_learned_range_is_between_the_clipped_posterior_and_beta():
    # Nichol & Dhariwal 2021, eq. 15, whose two ends are the fixed variances.
    schedule = NoiseSchedule.cosine(100)
    learned = ddpm(schedule, 10, variance="learned_range")
    small, large = (ddpm(schedule, 10, variance=name) for name in ("fixed_small", "fixed_large"))
    for i in range(9):
        assert learned.row(i).sigma == 1
        assert math.exp(learned.row(i).log_var_min / 2) == pytest.approx(small.row(i).sigma, rel=1e-12)
        assert math.exp(learned.row(i).log_var_max / 2) == pytest.approx(large.row(i).sigma, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, r"steps must be a whole number in 1\.\.1000, not"),
        ({"steps": -3}, r"steps must be a whole number in 1\.\.1000, not"),
        ({"steps": 1001}, r"steps must be a whole number in 1\.\.1000, not"),
        ({"steps": 2.5}, r"steps must be a whole number in 1\.\.1000, not"),
        ({"steps": True}, r"steps must be a whole number in 1\.\.1000, not"),
        ({"steps": "ten"}, r"steps must be a whole number in 1\.\.1000, not"),
        ({"spacing": "cubic"}, "leading, linspace, trailing, quad"),
        ({"prediction_type": "x0"}, "epsilon, sample, v_prediction"),
        ({"steps": 10**400}, r"steps must be a whole number in 1\.\.1000, not"),
        ({"spacing": ["leading"]}, "leading, linspace, trailing, quad"),
        ({"clip": -1.0}, r"clip must be a number in \[0, 3.4e38\], or inf, not -1.0"),
        ({"clip": math.nan}, "clip must be a number in"),
        ({"clip": "1"}, "clip must be a number in"),
        ({"clip": True}, "clip must be a number in"),
        ({"guidance_scale": 10**400}, "guidance_scale must be a finite number"),
        ({"guidance_scale": math.nan}, "finite"),
        ({"guidance_interval": (700, 200)}, "low <= high"),
    ],
)
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_wrong_arguments(sampler, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        SAMPLERS[sampler](NoiseSchedule.linear(), **arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sampler", "arguments", "message"),
    [
        ("ddpm", {"variance": "fixed_large_log"}, "fixed_small, fixed_large, learned_range"),
        ("ddim", {"eta": -0.1}, r"eta must be a number in \[0, 3.4e38\], not -0.1"),
        ("ddim", {"eta": math.nan}, "eta must be a number in"),
        ("ddim", {"eta": "1"}, "eta must be a number in"),
        ("ddim", {"use_clipped_model_output": 1}, "use_clipped_model_output must be true or false"),
        ("dpm++", {"sde": "yes"}, "sde must be true or false"),
        ("ddim", {"eta": 5.0}, "too large"),
    ],
)
def test_wrong_options(sampler, arguments, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[sampler](NoiseSchedule.linear(), 50, **arguments)


def test_numbers_of_numpy_and_torch():
    plain = ddim(
        NoiseSchedule.linear(), 50, eta=0.5, clip=2.0, guidance_interval=(100, 800), guidance_scale=3
    )
    other = ddim(
        NoiseSchedule.linear(),
        np.int64(50),
        eta=np.float32(0.5),
        clip=torch.tensor(2),
        guidance_scale=np.array(3),
        guidance_interval=np.array([100, 800]),
    )
    assert torch.equal(plain.table, other.table)


@variants
def test_epsilon_prediction_cannot_start_at_zero_snr(sampler, options):
    schedule = NoiseSchedule.linear().rescale_zero_terminal_snr()
    with pytest.raises(ValueError, match="SNR is zero"):
        SAMPLERS[sampler](schedule, 20, spacing="trailing", **options)
    SAMPLERS[sampler](schedule, 20, spacing="leading", **options)  # does not visit the last timestep
    if "epsilon_at_zero_snr" in options_of(sampler):
        table = SAMPLERS[sampler](schedule, 20, spacing="trailing", epsilon_at_zero_snr=True, **options)
        assert table.timesteps[0] == schedule.T - 1


def test_coefficients_that_float32_cannot_hold():
    with pytest.raises(ValueError, match="overflow float32"):
        ddpm(NoiseSchedule.from_betas([0.5] + [1 - 1e-15] * 10))


@pytest.fixture
def warned(monkeypatch):
    """The messages about spacings so far, in a process that has not been warned."""
    monkeypatch.setattr("diffusion.samplers.timesteps._warned", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in caught if warning.category is SpacingWarning]


@pytest.mark.parametrize(
    ("schedule", "spacing", "steps", "first"),
    [
        (NoiseSchedule.linear(), "leading", 501, 500),
        (NoiseSchedule.cosine(), "leading", 600, 599),
        (NoiseSchedule.cosine(), "leading", 334, 666),
        (NoiseSchedule.cosine(), "leading", 2, 500),
        (NoiseSchedule.linear(), "linspace", 1, 0),
        (NoiseSchedule.cosine(), "quad", 50, 800),
        (NoiseSchedule.cosine(10), "leading", 6, 5),
    ],
)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_start_that_still_has_signal_is_told_once(warned, sampler, schedule, spacing, steps, first):
    for _ in range(2):
        table = SAMPLERS[sampler](schedule, steps, spacing=spacing)
    assert table.timesteps[0] == first
    (message,) = warned()
    assert f"timestep {first}" in message
    assert repr(spacing) in message
    assert "'trailing'" in message
    assert "\n" not in message


def test_dpmpp_tells_of_its_start_too(warned):
    dpmpp_2m(NoiseSchedule.linear(), 502)
    assert len(warned()) == 1


@pytest.mark.parametrize(
    ("make", "T"), [(NoiseSchedule.linear, 1000), (NoiseSchedule.cosine, 1000), (NoiseSchedule.linear, 10)]
)
@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_a_start_in_noise_is_not_told_of(warned, sampler, make, T):
    for steps in {1, 2, 7, T // 2 + 1, T - 1, T}:
        SAMPLERS[sampler](make(T), steps, spacing="trailing")
    SAMPLERS[sampler](make(T), None)
    if T == 1000:
        for steps in (20, 50, 100, 999):
            SAMPLERS[sampler](make(T), steps, spacing="leading")
            SAMPLERS[sampler](make(T), steps, spacing="linspace")
    assert warned() == []
