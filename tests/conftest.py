"""Small models with random weights, which every test can afford to run."""

import pytest
import torch
from diffusion.kernels import _native
from native import TESTED

from diffusion import DDPM, NoiseSchedule, UNet, UNetConfig

# The models here are too small for more: on a busy machine, threads would only wait for each other.
torch.set_num_threads(1)


def make_model(
    num_classes: int | None = None,
    *,
    prediction_type: str = "epsilon",
    learned_variance: bool = False,
    channels: int = 2,
    T: int = 1000,
    seed: int = 0,
    **options,
) -> DDPM:
    """A model of 8x8 images, about 10,000 parameters, none of them zero."""
    config = UNetConfig(
        sample_size=8,
        in_channels=channels,
        out_channels=2 * channels if learned_variance else channels,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        norm_groups=4,
        num_classes=num_classes,
    )
    unet = UNet(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    schedule = NoiseSchedule.linear(T, beta_end=min(0.5, 20 / T))
    return DDPM(unet, schedule, prediction_type=prediction_type, **options).eval()


@pytest.fixture(params=TESTED)
def simd(request):
    """Each instruction set that is tested, in use."""
    _native.use_simd(request.param)
    yield request.param
    _native.use_simd("best")


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """The warning about spacings is not given: most tests take few steps, wherever those start."""
    monkeypatch.setattr("diffusion.samplers.table._warned", True)


@pytest.fixture
def model() -> DDPM:
    """Unconditional."""
    return make_model()


@pytest.fixture
def conditional() -> DDPM:
    """Of ten classes."""
    return make_model(10)
