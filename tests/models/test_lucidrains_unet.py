"""LucidrainsUNet. That it computes what the original computes is in tests/importers/test_lucidrains.py."""

import json
from dataclasses import replace

import pytest
import torch

from diffusion.models.lucidrains import LucidrainsUNet
from diffusion.models.lucidrains_config import LucidrainsConfig
from diffusion.models.registry import build, config_from_dict, config_to_dict

TINY = LucidrainsConfig(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    channels=4,
    channel_mult=(1, 2),
    full_attention=(False, True),
    num_heads=(1, 2, 2),
    head_channels=(4, 6, 4),
)
VARIANTS = {
    "tiny": TINY,
    "labels": replace(TINY, num_classes=3),
    "self_condition": replace(TINY, self_condition=True),
    "learned_variance": replace(TINY, out_channels=4),
    "fourier": replace(TINY, fourier_channels=6),
    "release_1": replace(
        TINY, memory_tokens=0, norm_groups=2, attention_norm="layer", mean_values=True, downsample="conv"
    ),
    "qk_norm": replace(TINY, memory_tokens=0, norm_groups=2, qk_norm_scale=16.0),
    "widths": replace(TINY, channel_mult=(3, 2), init_channels=6, theta=500.0, dropout=0.5),
    "one_level": replace(
        TINY, channel_mult=(2,), full_attention=(False,), num_heads=(1, 2), head_channels=(4, 4)
    ),
    "oblong": replace(TINY, sample_size=(4, 8)),
}


def network(config):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        unet = LucidrainsUNet(config).eval()
        for parameter in unet.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return unet


def inputs(config):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, *config.image_shape, generator=generator)
    return x, torch.tensor([3, 403]), torch.tensor([0, 2]) if config.num_classes else None


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_gradients_and_configuration(name):
    config = VARIANTS[name]
    unet = network(config)
    out = unet(*inputs(config))
    assert out.shape == (2, config.out_channels, *config.image_shape)
    assert (out[0] - out[1]).abs().max() > 0.01
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.parameters())
    again = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    assert type(build(again)) is LucidrainsUNet
    assert config.num_parameters == sum(p.numel() for p in unet.parameters())


@pytest.mark.parametrize("name", VARIANTS)
def test_dtypes_and_backends(name):
    config = VARIANTS[name]
    unet, arguments = network(config), inputs(config)
    with torch.no_grad():
        exact = unet.double()(*arguments)
        single = unet.float()(*arguments)
        torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(unet(*arguments, backend="reference"), single, rtol=1e-4, atol=1e-4)
        narrow = unet.bfloat16()(*arguments)
    assert (exact.dtype, narrow.dtype) == (torch.float64, torch.bfloat16)
    assert (narrow.double() - exact).square().mean().sqrt() < 0.1 * exact.std()


def test_self_condition():
    config = VARIANTS["self_condition"]
    unet, (x, t, _) = network(config), inputs(config)
    with torch.no_grad():
        none = unet(x, t)
        assert torch.equal(unet(x, t, x0_prev=torch.zeros_like(x)), none)
        assert (unet(x, t, x0_prev=torch.ones_like(x)) - none).abs().max() > 0.01
    with pytest.raises(ValueError, match="x0_prev must be like x"):
        network(TINY)(x, t, x0_prev=x)


def test_no_label_is_the_null_label():
    config = VARIANTS["labels"]
    unet, (x, t, labels) = network(config), inputs(config)
    with torch.no_grad():
        assert torch.equal(unet(x, t), unet(x, t, torch.full_like(labels, 3)))
    with pytest.raises(ValueError, match="labels must be None"):
        network(TINY)(x, t, labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 7}, "multiples of 2"),
        ({"num_heads": (1, 2)}, "num_heads must be 3 values for 2 levels"),
        ({"full_attention": (True,)}, "full_attention must be 2 values"),
        ({"channels": 5}, "channels and fourier_channels must be even"),
        ({"downsample": "pool"}, "unknown downsample 'pool'"),
        ({"attention_norm": "group"}, "unknown attention_norm 'group'"),
        ({"channel_mult": ()}, "at least one level"),
        ({"theta": 0.0}, "theta must be"),
        ({"memory_tokens": -1}, "memory_tokens must be"),
    ],
)
def test_configurations_that_there_are_not(change, message):
    with pytest.raises(ValueError, match=message) as error:
        replace(TINY, **change)
    assert "\n" not in str(error.value)
