"""Every option of DPM-Solver against diffusers' multistep scheduler, step by step with injected noise."""

import importlib
import math
from itertools import product

import diffusers
import pytest
import torch

from diffusion.process.schedule import NoiseSchedule
from diffusion.samplers import dpmpp_2m
from helpers.models import make_model
from helpers.trajectories import Denoiser, difference, noises, run_table

ALGORITHMS = ["dpmsolver++", "dpmsolver"]
SIGMAS = ["timesteps", "karras", "lu", "exponential", "beta"]
SWITCHES = {
    "timesteps": None,
    "karras": "use_karras_sigmas",
    "lu": "use_lu_lambdas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
SAME = ("solver_order", "solver_type", "final_sigmas_type", "lower_order_final", "euler_at_final")
SAME += ("prediction_type", "lambda_min_clipped", "steps_offset")
SCHEDULES = {"linear": NoiseSchedule.linear, "squaredcos_cap_v2": NoiseSchedule.cosine}
MIN = "sigma_min"


def compare(
    steps: int,
    *,
    T: int = 1000,
    beta_schedule: str = "linear",
    spacing: str = "linspace",
    sde: bool = False,
    algorithm: str = "dpmsolver++",
    sigmas: str = "timesteps",
    thresholding: bool = False,
    **same,
) -> float:
    """Largest difference of our trajectory from diffusers', which must visit the same timesteps.

    Relative to the largest number in x, where that is above 1: solvers of noise that are cut short end in it.
    """
    config = {name: value for name, value in same.items() if name in SAME}
    assert config == same
    if SWITCHES[sigmas]:
        config[SWITCHES[sigmas]] = True
    if thresholding:
        config |= {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.3}
    scheduler = diffusers.DPMSolverMultistepScheduler(
        T,
        beta_schedule=beta_schedule,
        timestep_spacing=spacing,
        algorithm_type=("sde-" if sde else "") + algorithm,
        **config,
    )
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)  # it would look for its first timestep, which may come twice
    schedule = SCHEDULES[beta_schedule](T).in_float32()
    table = dpmpp_2m(
        schedule,
        steps,
        spacing=spacing,
        clip=None,
        sde=sde,
        algorithm=algorithm,
        sigmas=sigmas,
        noise_in_last_step=True,
        **same,
    )
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    model = Denoiser(schedule, same.get("prediction_type", "epsilon"))
    noise = noises(len(table))
    x, theirs = noise[0], []
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.import_module(type(scheduler).__module__)
        patch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise[len(theirs) + 1])
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, int(t)), t, x).prev_sample
            theirs.append(x)
    limits = {"ratio": 0.8, "max_value": 1.3} if thresholding else None
    ours = run_table(table, model, noise, limits)
    return max(
        difference([a], [b]) / max(1.0, b.abs().max().item()) for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.thinned(2)
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    ("solver_order", "solver_type"), [(1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")]
)
@pytest.mark.parametrize(
    ("algorithm", "sde", "end"),
    [
        ("dpmsolver++", False, "zero"),
        ("dpmsolver++", False, MIN),
        ("dpmsolver++", True, "zero"),
        ("dpmsolver++", True, MIN),
        ("dpmsolver", False, MIN),
        ("dpmsolver", True, MIN),
    ],
)
def test_orders_and_algorithms(algorithm, sde, end, solver_order, solver_type, prediction_type):
    if (algorithm, sde, solver_order) == ("dpmsolver", True, 3):
        return  # diffusers has none
    for steps, lower, euler in [
        (1, True, False),
        (2, True, False),
        (3, False, False),
        (8, True, False),
        (8, False, True),
        (20, True, False),
        (20, True, True),
    ]:
        error = compare(
            steps,
            algorithm=algorithm,
            sde=sde,
            final_sigmas_type=end,
            solver_order=solver_order,
            solver_type=solver_type,
            prediction_type=prediction_type,
            lower_order_final=lower,
            euler_at_final=euler,
        )
        assert error < 1e-4, (steps, lower, euler)


@pytest.mark.parametrize("sigmas", SIGMAS)
@pytest.mark.parametrize("beta_schedule", SCHEDULES)
@pytest.mark.parametrize("end", ["zero", MIN])
def test_noise_levels(sigmas, beta_schedule, end):
    for steps, order in product([5, 10, 17], [1, 2, 3]):
        if (steps, order, end) == (17, 3, MIN) and sigmas != "timesteps":
            continue  # the last step goes nowhere, and diffusers divides by its length
        error = compare(
            steps,
            sigmas=sigmas,
            beta_schedule=beta_schedule,
            final_sigmas_type=end,
            solver_order=order,
            prediction_type="v_prediction",
        )
        assert error < 1e-4, (steps, order)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("bound", [-math.inf, -5.1, -2.0])
def test_a_bound_of_lambda(spacing, bound):
    for steps, offset in product([5, 12, 30], [0, 1]):
        error = compare(
            steps,
            spacing=spacing,
            lambda_min_clipped=bound,
            steps_offset=offset,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
        )
        assert error < 1e-4, (steps, offset)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_thresholding(algorithm, order):
    for steps in (6, 20):
        error = compare(
            steps, algorithm=algorithm, solver_order=order, thresholding=True, final_sigmas_type=MIN
        )
        assert error < 1e-4, steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "dpmsolver"}, "final_sigmas_type='sigma_min'"),
        (
            {"algorithm": "dpmsolver", "final_sigmas_type": MIN, "sde": True, "solver_order": 3},
            "no solver_order 3",
        ),
        ({"solver_order": 4}, "solver_order must be a whole number in 1..3"),
        ({"solver_type": "bh2"}, "unknown solver_type 'bh2'; choose from: midpoint, heun"),
        ({"sigmas": "flow"}, "unknown sigmas 'flow'; choose from: timesteps, karras"),
        ({"final_sigmas_type": "one"}, "choose from: zero, sigma_min"),
        ({"lambda_min_clipped": "low"}, "lambda_min_clipped must be a number"),
        ({"lambda_min_clipped": 9.0}, "leaves no timestep"),
        ({"lambda_min_clipped": 4.0}, "no 20 timesteps below"),
        ({"euler_at_final": 1}, "euler_at_final must be true or false"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        dpmpp_2m(NoiseSchedule.linear(), 20, spacing="linspace", **options)


@pytest.mark.parametrize(
    "options", [{"solver_order": 3}, {"algorithm": "dpmsolver", "final_sigmas_type": MIN}]
)
@pytest.mark.parametrize("threshold", [None, 0.9])
def test_the_sampling_loop_recalls_what_the_table_says(options, threshold):
    model, steps = make_model().eval(), 8
    shape = (2, model.unet.config.in_channels, *model.unet.config.image_shape)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in range(steps + 1)]
    seen: list[torch.Tensor] = []
    model.sample(
        num_samples=2,
        sampler="dpm++",
        steps=steps,
        spacing="trailing",
        noise=noise.__getitem__,
        callback=lambda i, x, x0: seen.append(x),
        dynamic_threshold=threshold,
        **options,
    )
    clip = {} if threshold is None else {"clip": None}
    table = model.steps("dpm++", steps, spacing="trailing", **options, **clip)
    assert table.history is not None
    with torch.no_grad():
        limits = None if threshold is None else {"ratio": threshold, "max_value": math.inf}
        expected = run_table(table, lambda x, t: model.unet(x, torch.full((2,), t)), noise, limits)
    assert difference(seen, expected) < 1e-4
