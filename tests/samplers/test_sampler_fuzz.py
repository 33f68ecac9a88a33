"""Random networks and samplers: the fastest way to sample gives what plain PyTorch gives."""

import random
from typing import Any

import pytest
import torch

from diffusion import DDPM, NoiseSchedule, UNet, UNetConfig
from diffusion.models.config import RESAMPLING
from diffusion.process.prediction import PREDICTION_TYPES
from diffusion.samplers.timesteps import SPACINGS

CASES = 150
NETWORK_ERROR = 1e-5  # allowed error of a fused network, relative to the largest output (test_cpu_plan.py)


def random_config(draw: random.Random) -> UNetConfig:
    """Some small architecture. Most are refused because their groups do not divide their channels."""
    while True:
        levels = draw.randint(1, 3)
        patch = draw.choice([1, 1, 1, 2])
        images = draw.choice([1, 2, 3])
        options: dict[str, Any] = {
            "sample_size": tuple(patch * 2 ** (levels - 1) * draw.randint(1, 5) for _ in range(2)),
            "patch_size": patch,
            "in_channels": images,
            "out_channels": images * draw.choice([1, 1, 2]),
            "channels": draw.choice([8, 12, 16, 24, 32]),
            "channel_mult": tuple(draw.choice([1, 1.5, 2]) for _ in range(levels)),
            "num_res_blocks": draw.choice([1, 1, 2]),
            "attention_levels": tuple(level for level in range(levels) if draw.random() < 0.4),
            "mid_attention": draw.random() < 0.7,
            "mid_attention_groups": draw.choice([None, None, 0]),
            "num_heads": draw.choice([1, 2, 4]),
            "scale_shift": draw.random() < 0.4,
            "flip_sin_to_cos": draw.random() < 0.5,
            "freq_shift": draw.choice([0, 1]),
            "downsample": draw.choice(RESAMPLING),
            "upsample": draw.choice(RESAMPLING),
            "downsample_padding": draw.choice(["asymmetric", "symmetric"]),
            "norm_groups": draw.choice([1, 2, 4, 8]),
            "num_classes": draw.choice([None, 1, 7]),
        }
        try:
            config = UNetConfig(**options)
            with torch.device("meta"):
                UNet(config)
            return config
        except ValueError:
            continue


def random_model(draw: random.Random) -> DDPM:
    """A model whose parameters are random, and none of them 0."""
    config = random_config(draw)
    T = draw.choice([10, 50, 1000])
    schedule = draw.choice([NoiseSchedule.linear, NoiseSchedule.cosine, NoiseSchedule.scaled_linear])(T)
    prediction_type = draw.choice(PREDICTION_TYPES)
    if prediction_type != "epsilon" and draw.random() < 0.3:
        schedule = schedule.rescale_zero_terminal_snr()
    unet = UNet(config)
    generator = torch.Generator().manual_seed(draw.randrange(2**31))
    with torch.no_grad():
        for parameter in unet.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return DDPM(unet, schedule, prediction_type=prediction_type).eval()


def random_options(draw: random.Random, model: DDPM) -> dict[str, Any]:
    """Arguments of `DDPM.sample`."""
    config, T = model.unet.config, model.schedule.T
    sampler = draw.choice(["ddpm", "ddim", "dpm++"])
    count = draw.randint(1, 5)
    options: dict[str, Any] = {
        "sampler": sampler,
        "steps": draw.randint(1, 10),
        "spacing": draw.choice(SPACINGS),
        "num_samples": count,
        "sample_ids": [draw.randrange(2**40) for _ in range(count)],
        "seed": draw.randrange(2**64),
        "dtype": draw.choice(["float32", "float32", "bfloat16", "float16"]),
    }
    # PyTorch's own strided convolution in bfloat16 (2.14, oneDNN) gives NaN at random where its output is one
    # pixel wide, so it is no peer there.
    if min(config.image_shape) == config.patch_size * 2 ** (len(config.channel_mult) - 1):
        options["dtype"] = "float32"
    if sampler == "ddpm":
        variances = ["fixed_small", "fixed_large"] + ["learned_range"] * config.learned_variance
        options["variance"] = draw.choice(variances)
    elif sampler == "ddim":
        options |= {"eta": draw.choice([0.0, 0.3, 1.0]), "use_clipped_model_output": draw.random() < 0.5}
    else:
        options["sde"] = draw.random() < 0.5
    if config.num_classes is not None and draw.random() < 0.8:
        options["labels"] = [draw.randrange(config.num_classes) for _ in range(count)]
        options["guidance_scale"] = draw.choice([1.0, 0.0, 2.5])
        if draw.random() < 0.5:
            options["guidance_interval"] = tuple(sorted(draw.randrange(T) for _ in range(2)))
        options["guidance_rescale"] = draw.choice([0.0, 0.0, 0.7])
    if draw.random() < 0.3:
        options["dynamic_threshold"] = draw.choice([0.5, 0.9, 1.0])
        options["dynamic_threshold_max"] = draw.choice([1.0, 1.5])
    if draw.random() < 0.3:
        options["batch_size"] = draw.randint(1, count)
    if draw.random() < 0.2:
        shape = (count, config.in_channels, *config.image_shape)
        noises = [torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k in range(11)]
        options["noise"] = noises.__getitem__
    return options


def perturbed(model: DDPM) -> DDPM:
    """The model with outputs as far from the right ones as a fused network's may be."""
    model, generator = model.copy(), torch.Generator().manual_seed(1)

    def disturb(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(output.shape, generator=generator) * 2 - 1
        return output + NETWORK_ERROR * output.abs().max() * noise

    model.unet.register_forward_hook(disturb)
    return model


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x - y).double().square().mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize("case", range(CASES))
def test_auto_is_the_reference(case):
    # The same case for the same number, on every machine.
    draw = random.Random(case)
    model = random_model(draw)
    options = random_options(draw, model)
    dtype = options.pop("dtype")
    actual = model.sample(**options, dtype=dtype, backend="auto")
    expected = model.sample(**options, dtype="float32", backend="reference")
    assert actual.shape == expected.shape
    if dtype == "float32":
        peer = perturbed(model).sample(**options, backend="reference")
    else:
        peer = model.sample(**options, dtype=dtype, backend="reference")
    # A chain multiplies what its steps are off by, the more so the fewer steps it has: so the error is
    # measured by that of a chain whose outputs are off by what they may be.
    error, allowed = distance(actual, expected), distance(peer, expected)
    assert error <= 2 * allowed + 1e-6 * max(1.0, expected.abs().max().item()), (model.unet.config, options)
