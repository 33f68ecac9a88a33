"""The networks beside the UNet. That they compute what the originals do is in test_small_ddpms.py."""

import copy
import json
import math

import pytest
import torch

from diffusion.models import diagonal_unet
from diffusion.models.context_unet import ContextUNetConfig
from diffusion.models.conv_stack import ConvStackConfig
from diffusion.models.diagonal_unet import DiagonalUNetConfig, diagonal_attention
from diffusion.models.naive_unet import NaiveUNetConfig
from diffusion.models.registry import build, config_from_dict, config_to_dict

DIAGONAL = DiagonalUNetConfig(sample_size=8, channels=8, channel_mult=(1, 2), num_timesteps=9)
CONFIGS = {
    "diagonal": DIAGONAL,
    "diagonal_labels": DiagonalUNetConfig(
        sample_size=(4, 8), in_channels=3, out_channels=3, channels=8, channel_mult=(1, 2), num_classes=3
    ),
    "context": ContextUNetConfig(sample_size=8, channels=8, pool=2, num_timesteps=9, num_classes=3),
    "context_concatenated": ContextUNetConfig(
        sample_size=8, channels=8, pool=2, num_timesteps=9, num_classes=3, concatenate=True
    ),
    "naive": NaiveUNetConfig(sample_size=16, channels=8, pool=2, num_timesteps=9),
    "naive_wide": NaiveUNetConfig(sample_size=16, channels=32, pool=2, num_timesteps=9, wide=True),
    "stack": ConvStackConfig(sample_size=6, widths=(8, 4)),
}


def randomized(config):
    torch.manual_seed(0)
    network = build(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    for buffer in network.buffers():
        if buffer.is_floating_point() and buffer.ndim == 1:  # statistics of batch normalisation
            buffer.uniform_(0.5, 1.5)
    return network


def inputs(config, batch=2):
    x = torch.randn(
        batch, config.in_channels, *config.image_shape, generator=torch.Generator().manual_seed(1)
    )
    t = torch.arange(1, batch + 1)
    return x, t, None if config.num_classes is None else t % config.num_classes


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_gradients(name):
    """The gradient of every parameter is finite."""
    config = CONFIGS[name]
    network = randomized(config).train()
    output = network(*inputs(config))
    assert output.shape == (2, config.out_channels, *config.image_shape)
    output.square().sum().backward()
    assert not [
        name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_round_trip(name):
    config = CONFIGS[name]
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    assert config.num_parameters == sum(p.numel() for p in build(config).parameters())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(name, dtype):
    config = CONFIGS[name]
    network, args = randomized(config), inputs(config)
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(*args)
        output = copy.deepcopy(network).to(dtype)(*args)
    assert output.dtype == dtype
    # bfloat16 has 8 bits, and the networks some twenty layers.
    assert (output - expected).norm() <= (1e-12 if dtype == torch.float64 else 0.1) * expected.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_and_batches_agree(name):
    config = CONFIGS[name]
    network = randomized(config).double()
    x, t, labels = inputs(config, batch=3)
    with torch.no_grad():
        expected = network(x, t, labels)
        last = network(x.contiguous(memory_format=torch.channels_last), t, labels)
        alone = network(x[1:2], t[1:2], None if labels is None else labels[1:2])
    torch.testing.assert_close(last, expected)
    torch.testing.assert_close(alone, expected[1:2])


@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.num_classes])
def test_the_null_label_is_no_label(name):
    config = CONFIGS[name]
    network = randomized(config)
    x, t, labels = inputs(config)
    with torch.no_grad():
        without = network(x, t)
        torch.testing.assert_close(
            network(x, t, torch.full_like(t, config.null_label)), without, rtol=0, atol=0
        )
        assert (network(x, t, labels) - without).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["context", "naive"])
def test_fractions_of_the_timesteps(name):
    """A floating-point timestep is a fraction of T already."""
    config = CONFIGS[name]
    network, (x, t, _) = randomized(config), inputs(config)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t / 9), network(x, t), rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"fractions of 9 in \[0, 1\], not 1..2; give integers for 0..9"):
            network(x, t.float())


def test_times_between_the_rows_of_the_table():
    network, (x, t, _) = randomized(DIAGONAL), inputs(DIAGONAL)
    with torch.no_grad():
        torch.testing.assert_close(network(x, t.float()), network(x, t))
        between = network(x, t + 0.5)
    assert (between - network(x, t)).abs().max() > 1e-4


@pytest.mark.parametrize("rows", [1, 5, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_diagonal_attention(monkeypatch, rows, dtype):
    """The diagonal of the whole softmax, and its gradient, for any number of rows at a time."""
    monkeypatch.setattr(diagonal_unet, "SCORES", rows * 2 * 11)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 2, 11, 4, generator=generator).mul(3).to(dtype).requires_grad_() for _ in "qkv")
    result = diagonal_attention(q, k, v, 0.3)
    wide = [part.detach().double().requires_grad_() for part in (q, k, v)]
    weights = torch.softmax(wide[0] @ wide[1].transpose(-1, -2) * 0.3, dim=-1)
    expected = weights.diagonal(dim1=-2, dim2=-1)[..., None] * wide[2]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    result.square().sum().backward()
    expected.square().sum().backward()
    for part, reference in zip((q, k, v), wide, strict=True):
        difference = (part.grad - reference.grad).abs().max()
        assert difference <= 20 * tolerance * max(1, reference.grad.abs().max())


def test_large_scores_do_not_overflow():
    q = torch.full((1, 1, 2, 1), 1e4)
    result = diagonal_attention(q, torch.tensor([1.0, -1.0]).view(1, 1, 2, 1), torch.ones(1, 1, 2, 1), 1.0)
    assert result.flatten().tolist() == [1.0, 0.0]


def test_the_table_of_the_time():
    """Sine and cosine of t / 10000^(2 i / d) in turn, as in Vaswani et al. 2017, section 3.5."""
    table = build(DIAGONAL).time_table
    expected = [
        [wave(t / 10000 ** (2 * i / 8)) for i in range(4) for wave in (math.sin, math.cos)] for t in range(10)
    ]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiagonalUNetConfig(sample_size=6), "images of 6x6 cannot be halved 2 times"),
        (lambda: DiagonalUNetConfig(down_attention=(3,)), r"down_attention must be in 0..2, not \[3\]"),
        (lambda: DiagonalUNetConfig(channels=9), "channels must be even, not 9"),
        (
            lambda: DiagonalUNetConfig(channel_mult=()),
            "channel_mult must be a number for each of 1..16 levels",
        ),
        (lambda: build(ContextUNetConfig(sample_size=32)), "must be multiples of 28"),
        (lambda: build(NaiveUNetConfig(sample_size=28)), "must be multiples of 32"),
        (lambda: ConvStackConfig(widths=()), "widths must be a number for at least one convolution"),
        (lambda: ContextUNetConfig(num_classes=None), "num_classes must be"),
    ],
)
def test_impossible_configurations(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_arguments(name):
    config = CONFIGS[name]
    network, (x, t, _) = randomized(config), inputs(config)
    with pytest.raises(ValueError, match=r"x must have shape \[B, "):
        network(x[:, :0], t)
    with pytest.raises(ValueError, match=r"timesteps must have shape \[2\], not \[1\]"):
        network(x, t[:1])
    if config.num_classes is None:
        with pytest.raises(ValueError, match="this model is unconditional; labels must be None"):
            network(x, t, t)
        return
    with pytest.raises(ValueError, match=r"labels must be in 0..3( \(3 for no label\))?, not 1..4"):
        network(x, t, torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"labels must be integers of shape \[2\], not torch.float32"):
        network(x, t, t.float())
