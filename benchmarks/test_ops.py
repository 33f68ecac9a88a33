"""Every op, backend and peer on the shapes of real models: pytest benchmarks --benchmark-only.

Nothing whose result is wrong is timed. diffusion.kernels.benchmark_table has the same, interleaved.
"""

import pytest
import torch

from diffusion.kernels.benchmarks import subjects, timed_cases

pytestmark = pytest.mark.benchmark(max_time=0.3, min_rounds=5, warmup=False)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NATIVE = {"cpu": ["cpp"], "cuda": ["cuda", "triton"]}[DEVICE]
DTYPES = [torch.float32, torch.bfloat16]


def cases(op):
    return [
        (op, case, dtype) for case in timed_cases(op) for dtype in DTYPES if dtype in subjects()[op].dtypes
    ]


def guided_step(row, x, model_output, model_output_uncond):
    """Classifier-free guidance and one step of diffusers' DDPMScheduler, as its pipelines write them."""
    if model_output_uncond is not None:
        difference = model_output - model_output_uncond
        model_output = model_output_uncond + row.guidance_scale * difference
    return SCHEDULER.step(model_output, int(row.timestep), x, return_dict=False)


def diffusers_step(case, x, model_output, row, *, model_output_uncond, **options):
    return guided_step(row, x, model_output, model_output_uncond)


def diffusers_step_(case, x, model_output, table, counter, *, model_output_uncond, unet_input, **options):
    """The step, and the input of the UNet's next call, as a pipeline makes it."""
    x, _ = guided_step(case.case.row, x, model_output, model_output_uncond)
    return torch.cat([x] * (len(unet_input) // len(x)))


SCHEDULER = pytest.importorskip("diffusers").DDPMScheduler(num_train_timesteps=1000)
PEERS = {
    "reverse_step": {"diffusers": diffusers_step},
    "reverse_step_": {"diffusers": diffusers_step_},
}
STEPS = ["mnist", "cifar10_guided", "cifar10_guided_64", "imagenet64_guided"]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("op", "case", "dtype"), cases("group_norm_silu") + cases("attention"), ids=str)
@pytest.mark.parametrize("run", [*NATIVE, "reference", "torch"])
def test_differentiable(timed, run, op, case, dtype, backward):
    timed(run, op, case, dtype, DEVICE, backward=backward)


@pytest.mark.parametrize(("op", "case", "dtype"), cases("conv2d"), ids=str)
@pytest.mark.parametrize("run", [*NATIVE, "reference", "torch"])
def test_conv2d(timed, run, op, case, dtype):
    timed(run, op, case, dtype, DEVICE, backward=True)


@pytest.mark.parametrize(("op", "case", "dtype"), cases("conv3x3"), ids=str)
@pytest.mark.parametrize("run", [*NATIVE, "reference", "torch"])
def test_conv3x3(timed, run, op, case, dtype):
    timed(run, op, case, dtype, DEVICE)


@pytest.mark.parametrize(("op", "case", "dtype"), cases("philox_normal"), ids=str)
@pytest.mark.parametrize("run", [*NATIVE, "reference", "torch"])
def test_philox_normal(timed, run, op, case, dtype):
    timed(run, op, case, dtype, DEVICE)


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize("op", PEERS)
@pytest.mark.parametrize("run", [*NATIVE, "reference", "diffusers"])
def test_step(timed, run, op, case):
    timed(run, op, case, torch.float32, DEVICE, peers=PEERS[op])
