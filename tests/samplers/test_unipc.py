"""UniPC: its algorithms written out in float64, and diffusers' scheduler."""

import math

import diffusers
import pytest
import torch

from diffusion.process.schedule import NoiseSchedule
from diffusion.samplers import unipc
from helpers.models import make_model
from helpers.trajectories import Denoiser, difference, noises, run_table

SCHEDULE = NoiseSchedule.linear()
IN_NOISE = {"predict_x0": False, "final_sigmas_type": "sigma_min"}
VARIANTS = [
    {"solver_order": 1},
    {},
    {"solver_order": 3},
    {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},  # without it, diffusers gives NaN
    {"solver_type": "bh1", "solver_order": 3, "final_sigmas_type": "sigma_min"},
    {"solver_order": 3, "lower_order_final": False},
    {"final_sigmas_type": "sigma_min", "lower_order_final": False},
    IN_NOISE,
    {"solver_order": 3, **IN_NOISE},
]


def phi(k: int, z: float) -> float:
    """phi_0 = e^z and phi_{k+1} = (phi_k - 1 / k!) / z."""
    return math.exp(z) if k == 0 else (phi(k - 1, z) - 1 / math.factorial(k - 1)) / z


def paper(model, x, timesteps, orders, bh, of_noise, last):
    """x after every step: Zhao et al. 2023, algorithms 2 (UniC) and 1 (UniP), with x corrected by the m of
    the predicted x. of_noise: m is the noise, else the image."""
    signals = [SCHEDULE.alphas_cumprod[t].item() for t in timesteps] + [last]
    alphas, sigmas = [math.sqrt(s) for s in signals], [math.sqrt(1 - s) for s in signals]
    lambdas = [math.log(a / s) if s else math.inf for a, s in zip(alphas, sigmas, strict=True)]
    outputs, trajectory, base = [], [], None

    def moved(x, i, order, target=None):
        """From level i to i + 1, by m_i and earlier ones, and by m_{i+1} if there is one."""
        scale = sigmas[i + 1] if of_noise else alphas[i + 1]
        ratio = alphas[i + 1] / alphas[i] if of_noise else sigmas[i + 1] / sigmas[i]
        h = lambdas[i + 1] - lambdas[i]
        signed = h if of_noise else -h
        x = ratio * x - scale * math.expm1(signed) * outputs[i]
        ks = list(range(1, order))
        if not ks and target is None:
            return x
        factor = signed if bh == "bh1" else math.expm1(signed)
        nodes = [(lambdas[i - k] - lambdas[i]) / h for k in ks] + [1.0] * (target is not None)
        differences = [outputs[i - k] - outputs[i] for k in ks]
        differences += [] if target is None else [target - outputs[i]]
        # sum_m a_m r_m^(n-1) = n! h phi_{n+1}(h) / B(h); a_m of order 2 and 1 alone is 1/2 (remark 1)
        size = len(nodes)
        if size == 1:
            weights = torch.tensor([0.5], dtype=torch.float64)
        else:
            matrix = torch.tensor([[r**n for r in nodes] for n in range(size)], dtype=torch.float64)
            right = [signed * phi(n + 1, signed) * math.factorial(n) / factor for n in range(1, size + 1)]
            weights = torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64))
        return x - scale * factor * sum(
            w * d / r for w, d, r in zip(weights.tolist(), differences, nodes, strict=True)
        )

    for i, t in enumerate(timesteps):
        epsilon = model(x, t)
        m = epsilon if of_noise else (x - sigmas[i] * epsilon) / alphas[i]
        if base is not None:
            x = moved(base, i - 1, orders[i - 1], target=m)
        outputs.append(m)
        base, x = x, moved(x, i, orders[i])
        trajectory.append(x)
    return trajectory


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_it_is_the_papers_algorithm(options):
    steps, model = 8, Denoiser(SCHEDULE, "epsilon", dtype=torch.float64)
    noise = [z.double() for z in noises(steps)]
    table = unipc(SCHEDULE, steps, spacing="trailing", clip=None, **options)
    order = options.get("solver_order", 2)
    orders = [min(i + 1, order) for i in range(steps)]
    if options.get("lower_order_final", True):
        orders = [min(o, steps - i) for i, o in enumerate(orders)]
    ends_in_noise = "final_sigmas_type" in options
    orders[-1] = orders[-1] if ends_in_noise else 1
    last = SCHEDULE.alphas_cumprod[0].item() if ends_in_noise else 1.0
    how = (options.get("solver_type", "bh2"), not options.get("predict_x0", True), last)
    expected = paper(model, noise[0], table.timesteps.tolist(), orders, *how)
    for found, x in zip(run_table(table, model, noise), expected, strict=True):
        torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-8)


@pytest.mark.thinned
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("options", [v for v in VARIANTS if "lower_order_final" not in v], ids=str)
def test_it_is_diffusers(options, prediction_type, spacing, steps):
    theirs = diffusers.UniPCMultistepScheduler(
        beta_end=0.02, timestep_spacing=spacing, prediction_type=prediction_type, **options
    )
    theirs.set_timesteps(steps)
    # In float64: diffusers rounds its noise levels to float32, and a long step multiplies that.
    alphas = SCHEDULE.alphas_cumprod.double()[[*theirs.timesteps.tolist(), 0]]
    theirs.sigmas = ((1 - alphas) / alphas).sqrt()
    if "final_sigmas_type" not in options:
        theirs.sigmas[-1] = 0
    model = Denoiser(SCHEDULE, prediction_type, dtype=torch.float64)
    noise = [z.double() for z in noises(steps)]
    x, trajectory = noise[0], []
    for t in theirs.timesteps.tolist():
        x = theirs.step(model(x, t), t, x).prev_sample
        trajectory.append(x)
    table = unipc(SCHEDULE, steps, spacing=spacing, prediction_type=prediction_type, clip=None, **options)
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    scale = max(1.0, max(x.abs().max().item() for x in trajectory))
    assert difference(run_table(table, model, noise), trajectory) < 1e-6 * scale


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_model_samples_as_the_pipeline(order):
    model = make_model(clip=None)
    z = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.UniPCMultistepScheduler(beta_end=0.02, solver_order=order, timestep_spacing="trailing")
    theirs.set_timesteps(10)
    x = z
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(model.unet(x, t.expand(2), None), t, x).prev_sample
    for options in ({}, {"callback": lambda i, x, x0: None}, {"backend": "reference"}):
        found = model.sample(
            noise=z, sampler="unipc", solver_order=order, steps=10, spacing="trailing", **options
        )
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_strength_is_that_of_diffusers():
    model, steps, first = make_model(clip=None), 12, 5
    image, z = torch.randn(2, 2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    image = image.clamp(-1, 1)
    theirs = diffusers.UniPCMultistepScheduler(beta_end=0.02, solver_order=3, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    theirs.set_begin_index(first)
    x = theirs.add_noise(image, z, theirs.timesteps[first : first + 1])
    with torch.no_grad():
        for t in theirs.timesteps[first:]:
            # diffusers corrects nothing before its first step
            x = theirs.step(model.unet(x, t.expand(2), None), t, x).prev_sample
    options = {"sampler": "unipc", "solver_order": 3, "steps": steps, "spacing": "trailing"}
    found = model.sample(image=image, strength=7 / 12, noise=z, **options)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_every_timestep_and_zero_snr():
    for options in ({}, {"solver_order": 3, "final_sigmas_type": "sigma_min"}):
        for schedule in (SCHEDULE, NoiseSchedule.linear().rescale_zero_terminal_snr()):
            table = unipc(schedule, prediction_type="v_prediction", spacing="trailing", **options)
            assert len(table) == 1000
            assert table.table.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_order": 4}, "solver_order must be a whole number in 1..3, not 4"),
        ({"solver_type": "midpoint"}, "unknown solver_type 'midpoint'; choose from: bh1, bh2"),
        ({"predict_x0": False}, "set final_sigmas_type='sigma_min'"),
        ({"predict_x0": 1}, "predict_x0 must be true or false"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        unipc(SCHEDULE, 5, **options)
