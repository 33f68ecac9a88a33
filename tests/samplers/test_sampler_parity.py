"""Every sampler's trajectory against the scheduler of that name in diffusers, with injected noise."""

import importlib
import math
from itertools import pairwise

import diffusers
import pytest
import torch

from diffusion.kernels import reverse_step
from diffusion.process.prediction import PREDICTION_TYPES
from diffusion.process.schedule import NoiseSchedule
from diffusion.samplers import SAMPLERS, ddim
from diffusion.samplers.timesteps import SPACINGS, spaced_timesteps
from helpers.samplers import TESTED, VARIANTS, peer_of, variants
from helpers.thinning import exhaustive_but
from helpers.trajectories import SHAPE, Denoiser, difference, noises, run_table

TOLERANCE = 1e-4
DIFFUSERS_SPACINGS = SPACINGS[:3]
SCHEDULES = {
    "linear": (NoiseSchedule.linear, {"beta_schedule": "linear"}),
    "scaled_linear": (
        NoiseSchedule.scaled_linear,
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (NoiseSchedule.cosine, {"beta_schedule": "squaredcos_cap_v2"}),
    "sigmoid": (NoiseSchedule.sigmoid, {"beta_schedule": "sigmoid"}),
}


def run_diffusers(
    scheduler, model, noise: list[torch.Tensor], eta: float | None = None
) -> list[torch.Tensor]:
    """x after every step.

    In the last one the injected noise is 0, and so is DDIM's eta: samplers here end without noise, where
    diffusers adds some if the last timestep is not 0.
    """
    x, trajectory, timesteps = noise[0], [], scheduler.timesteps.tolist()
    drawn = [*noise[1:-1], torch.zeros_like(x)]
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module(type(scheduler).__module__)
        patch.setattr(module, "randn_tensor", lambda *args, **kwargs: drawn[len(trajectory)])
        for t in timesteps:
            last = len(trajectory) == len(timesteps) - 1
            options = {} if eta is None else {"eta": 0.0 if last else eta}
            x = scheduler.step(model(x, t), t, x, **options).prev_sample
            trajectory.append(x)
    return trajectory


def run_paper(pair, model, noise: list[torch.Tensor]) -> list[torch.Tensor]:
    """x after every step of DDIM by Song et al. 2021, eq. 12 and 16, for the timesteps visited, tau."""
    signals, (x, *drawn), trajectory = pair.schedule.alphas_cumprod.tolist(), noise, []
    timesteps = pair.table.timesteps.tolist()
    for i, t in enumerate(timesteps):
        here = signals[t]
        there = signals[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
        output, alpha, sigma = model(x, t), math.sqrt(here), math.sqrt(1 - here)
        if pair.prediction_type == "epsilon":
            epsilon = output
        elif pair.prediction_type == "sample":
            epsilon = (x - alpha * output) / sigma
        else:
            epsilon = alpha * output + sigma * x
        x0 = ((x - sigma * epsilon) / alpha).clamp(-1, 1)
        s = pair.eta * math.sqrt((1 - there) / (1 - here) * (1 - here / there))
        x = math.sqrt(there) * x0 + math.sqrt(max(1 - there - s**2, 0.0)) * epsilon + s * drawn[i]
        trajectory.append(x)
    return trajectory


class Pair:
    """One sampler of this package and the scheduler of diffusers that it must equal."""

    def __init__(
        self,
        sampler: str,
        *,
        steps: int | None = None,
        T: int = 1000,
        schedule: str = "linear",
        zero_snr: bool = False,
        prediction_type: str = "epsilon",
        spacing: str = "leading",
        clip: float | None = 1.0,
        thresholding: dict | None = None,
        **options,
    ):
        make, config = SCHEDULES[schedule]
        config = {
            **config,
            "num_train_timesteps": T,
            "prediction_type": prediction_type,
            "timestep_spacing": spacing,
            "rescale_betas_zero_snr": zero_snr,
        }
        if thresholding:
            config |= {
                "thresholding": True,
                "dynamic_thresholding_ratio": thresholding["ratio"],
                "sample_max_value": thresholding["max_value"],
            }
        if TESTED[sampler].clips:
            config |= {"clip_sample": clip is not None, "clip_sample_range": clip}
        else:
            clip = None
        self.scheduler, _ = peer_of(sampler, options, **config)
        self.eta = options.get("eta")
        self.thresholding = thresholding
        self.prediction_type = prediction_type
        self.schedule = make(T).rescale_zero_terminal_snr() if zero_snr else make(T)
        self.table = SAMPLERS[sampler](
            self.schedule, steps, prediction_type=prediction_type, spacing=spacing, clip=clip, **options
        )
        self.scheduler.set_timesteps(steps or T)
        assert self.scheduler.timesteps.tolist() == self.table.timesteps.tolist()

    def run(self, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The trajectories of this package and of diffusers."""
        model = Denoiser(self.schedule, self.prediction_type, self.table.learned_variance, dtype)
        noise = [z.to(dtype) for z in noises(len(self.table))]
        theirs = run_diffusers(self.scheduler, model, noise, self.eta)
        return run_table(self.table, model, noise, self.thresholding), theirs


def parity(sampler: str, **options) -> float:
    """Largest difference between the trajectories of this package and of diffusers, in float32."""
    return difference(*Pair(sampler, **options).run())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("spacing", DIFFUSERS_SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@variants
def test_strided_parity(sampler, options, prediction_type, spacing):
    for steps in (50, 20, 30, 7, 1):
        if sampler == "ddim" and not strides_are_whole(spacing, steps):
            continue  # see test_ddim_is_that_of_the_paper
        error = parity(
            sampler,
            steps=steps,
            prediction_type=prediction_type,
            spacing=spacing,
            **options,
        )
        assert error < TOLERANCE, steps


def strides_are_whole(spacing: str, steps: int, T: int = 1000) -> bool:
    """Whether T // steps leads from each timestep visited to the next, as diffusers' DDIM takes it."""
    timesteps = spaced_timesteps(T, steps, spacing).tolist()
    return all(a - b == T // steps for a, b in pairwise(timesteps)) and timesteps[-1] < T // steps


@pytest.mark.thinned(2)
@pytest.mark.parametrize("spacing", DIFFUSERS_SPACINGS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_that_of_the_paper(eta, prediction_type, spacing):
    # For every number of steps, also those where diffusers' is another.
    for steps in (50, 30, 7, 2, 1):
        pair = Pair("ddim", steps=steps, prediction_type=prediction_type, spacing=spacing, eta=eta)
        model = Denoiser(pair.schedule, prediction_type, dtype=torch.float64)
        noise = [z.double() for z in noises(steps)]
        theirs = run_paper(pair, model, noise)
        assert difference(run_table(pair.table, model, noise), theirs) < 1e-10, steps


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_of_diffusers_leads_elsewhere_where_a_stride_is_not_whole(spacing):
    # From t to t - T // steps: with 501 steps, from 999 to 998 where the next timestep visited is 997.
    pair = Pair("ddim", steps=501, spacing=spacing, eta=0.0)
    assert not strides_are_whole(spacing, 501)
    assert pair.table.timesteps[:2].tolist() == [999, 997]
    x = torch.zeros(SHAPE, dtype=torch.float64)
    output = torch.full_like(x, 0.001)
    theirs = pair.scheduler.step(output, 999, x).prev_sample
    ours = run_table(pair.table, lambda *_: output, [x, x, *noises(501)[2:]])[0]
    signal = pair.schedule.alphas_cumprod[[999, 998, 997]].tolist()
    x0 = -math.sqrt(1 / signal[0] - 1) * output
    for found, there in ((theirs, signal[1]), (ours, signal[2])):
        expected = math.sqrt(there) * x0 + math.sqrt(1 - there) * output
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


FIRST = [next(variant for variant in VARIANTS if variant[0] == sampler) for sampler in TESTED]


@pytest.mark.thinned
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("variant", exhaustive_but(VARIANTS, default=FIRST), ids=str)
def test_full_chain_parity(variant, prediction_type):
    sampler, options = variant
    # The spacings agree on the full chain (see test_grids_are_those_of_diffusers).
    error = parity(sampler, prediction_type=prediction_type, spacing="trailing", **options)
    assert error < TOLERANCE


@pytest.mark.thinned
@pytest.mark.parametrize("steps", [None, 20, 7])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("sampler", "options"), [variant for variant in VARIANTS if TESTED[variant[0]].float64], ids=str
)
def test_parity_is_exact_in_float64(sampler, options, prediction_type, steps):
    # With float64 tables, diffusers has no rounding left to differ by. DPM-Solver++ is missing: it casts
    # its samples to float32.
    pair = Pair(sampler, T=200, steps=steps, prediction_type=prediction_type, **options)
    pair.scheduler.alphas_cumprod = pair.schedule.alphas_cumprod
    assert difference(*pair.run(torch.float64)) < 1e-10


@pytest.mark.thinned
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@variants
def test_float32_stays_close_to_float64(sampler, options, prediction_type):
    # A tenth of the tolerance that diffusers' float32 tables need.
    pair = Pair(sampler, prediction_type=prediction_type, steps=100, spacing="linspace", **options)
    ours, _ = pair.run(torch.float32)
    exact = run_table(
        pair.table,
        Denoiser(pair.schedule, prediction_type, pair.table.learned_variance, torch.float64),
        [z.double() for z in noises(len(pair.table))],
    )
    assert difference(ours, exact) < TOLERANCE / 10


@pytest.mark.thinned
@pytest.mark.parametrize("steps", [99, 33, 14, 15, 2])
@pytest.mark.parametrize("spacing", DIFFUSERS_SPACINGS)
@pytest.mark.parametrize("sde", [False, True])
def test_dpmpp_parity_at_the_ends_of_its_grids(sde, spacing, steps):
    assert parity("dpm++", T=100, steps=steps, spacing=spacing, sde=sde) < TOLERANCE


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("schedule", "T", "steps"),
    [
        ("cosine", 1000, 40),
        ("cosine", 100, None),
        ("scaled_linear", 1000, 25),
        ("linear", 10, None),
        ("linear", 10, 5),
        ("linear", 4000, 40),
    ],
)
@variants
def test_parity_for_other_schedules(sampler, options, schedule, T, steps):
    for prediction_type in PREDICTION_TYPES:
        # alpha is 5e-5 at the start of this one, where float32 leaves an unclipped x_0 of eps few digits.
        imprecise = (sampler, schedule, T, prediction_type) == ("dpm++", "cosine", 1000, "epsilon")
        error = parity(
            sampler,
            schedule=schedule,
            T=T,
            steps=steps,
            prediction_type=prediction_type,
            spacing="trailing",
            **options,
        )
        assert error < (5 if imprecise else 1) * TOLERANCE, prediction_type


@pytest.mark.parametrize("options", TESTED["ddpm"].options, ids=str)
def test_parity_for_sigmoid_betas(options):
    # only DDPMScheduler has it in diffusers
    assert parity("ddpm", schedule="sigmoid", steps=25, spacing="trailing", **options) < TOLERANCE


@pytest.mark.thinned(2)
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@variants
def test_parity_at_zero_terminal_snr(sampler, options, schedule, prediction_type):
    if options.get("eta") == 1:
        options = {"eta": 0.95}  # at 1, diffusers' float32 takes the root of a negative number here
    for T, steps in ((1000, 20), (100, None)):
        error = parity(
            sampler,
            zero_snr=True,
            schedule=schedule,
            T=T,
            steps=steps,
            prediction_type=prediction_type,
            spacing="trailing",
            **options,
        )
        assert error < TOLERANCE, (T, steps)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    ("sampler", "options"), [variant for variant in VARIANTS if TESTED[variant[0]].clips], ids=str
)
def test_parity_of_clipping(sampler, options, clip):
    assert parity(sampler, steps=20, spacing="trailing", clip=clip, **options) < TOLERANCE


@pytest.mark.thinned
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@variants
def test_parity_of_dynamic_thresholding(sampler, options, prediction_type):
    thresholding = {"ratio": 0.8, "max_value": 1.3}
    error = parity(
        sampler,
        steps=25,
        prediction_type=prediction_type,
        spacing="trailing",
        clip=None,
        thresholding=thresholding,
        **options,
    )
    assert error < TOLERANCE


def test_parity_of_guidance():
    schedule = NoiseSchedule.linear()
    table = ddim(schedule, 20, guidance_scale=3.0, guidance_interval=(200, 700))
    cond, uncond = Denoiser(schedule, "epsilon"), Denoiser(schedule, "epsilon")
    uncond.bias = -uncond.bias

    def guided(x, t):
        scale = 3.0 if 200 <= t <= 700 else 1.0
        return uncond(x, t) + scale * (cond(x, t) - uncond(x, t))

    noise = noises(20)
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(20)
    theirs = run_diffusers(scheduler, guided, noise, 0.0)
    x, ours = noise[0], []
    for i, t in enumerate(table.timesteps.tolist()):
        x, _ = reverse_step(x, cond(x, t), table.row(i), model_output_uncond=uncond(x, t))
        ours.append(x)
    assert difference(ours, theirs) < TOLERANCE
