"""UNetConfig and UNet. That the UNet computes what others compute is in test_importers.py."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, vmap

from diffusion import DDPM, NoiseSchedule
from diffusion.models.unet import UNet, UNetConfig, fourier_embedding, timestep_embedding
from diffusion.utils import memory
from helpers.unets import CONDITIONAL, TINY, UNPLANNED, VARIANTS, inputs, randomized

CONFIGURED = VARIANTS | {name: config for name, (config, _) in UNPLANNED.items()}


@pytest.mark.thinned
@pytest.mark.parametrize("name", CONFIGURED)
def test_shapes_and_gradients(name):
    """Every architecture puts out its channels, and every parameter has a say in them."""
    config = CONFIGURED[name]
    unet = randomized(config)
    x, t = inputs(config)
    labels = torch.tensor([0, 2]) if config.num_classes else None
    out = unet(x, t, labels)
    assert out.shape == (2, config.out_channels, *config.image_shape)
    assert (out[0] - out[1]).abs().max() > 0.01
    out.square().sum().backward()
    trained = [(name, p) for name, p in unet.named_parameters() if p.requires_grad]
    without = [name for name, p in trained if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


@pytest.mark.parametrize("name", CONFIGURED)
def test_config_round_trip(name):
    config = CONFIGURED[name]
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.thinned
@pytest.mark.parametrize("name", VARIANTS)
def test_layouts_agree(name):
    config = VARIANTS[name]
    unet = randomized(config).double()
    x, t = inputs(config)
    labels = torch.tensor([0, 2]) if config.num_classes else None
    with torch.no_grad():
        expected = unet(x.double(), t, labels)
        out = unet.to(memory_format=torch.channels_last)(
            x.double().contiguous(memory_format=torch.channels_last), t, labels
        )
    torch.testing.assert_close(out, expected)


def test_defaults_are_ddpm():
    """Ho et al. 2020, appendix B: 35.7 million parameters for CIFAR-10."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in UNet(UNetConfig()).parameters())
    assert round(count / 1e6, 1) == 35.7


@pytest.mark.parametrize("patch", [2, 4])
def test_patches_are_pixels_of_a_smaller_image(patch):
    """Channel c * p * p + i * p + j of the small image is pixel (i, j) of channel c of each patch."""
    unet = randomized(replace(TINY, sample_size=16, patch_size=patch))
    channels = patch**2 * TINY.in_channels
    small = UNet(replace(TINY, sample_size=16 // patch, in_channels=channels, out_channels=channels))
    small.load_state_dict(unet.state_dict())
    x, t = inputs(unet.config)
    parts = [
        x[:, c, i::patch, j::patch]
        for c in range(TINY.in_channels)
        for i in range(patch)
        for j in range(patch)
    ]
    with torch.no_grad():
        out, expected = unet(x, t), small(torch.stack(parts, dim=1), t)
    for n, part in enumerate(expected.unbind(1)):
        c, i, j = n // patch**2, n // patch % patch, n % patch
        torch.testing.assert_close(out[:, c, i::patch, j::patch], part, rtol=0, atol=1e-6)


def test_patches_must_fill_the_image():
    with pytest.raises(ValueError, match=r"patches of 4x4 .* multiples of 8"):
        replace(TINY, sample_size=12, patch_size=4)


def test_starts_at_zero():
    """DDPM's last convolution starts at zero, and so does the end of every branch."""
    x, t = inputs(TINY)
    unet = UNet(TINY)
    assert unet(x, t).abs().max() == 0
    block = unet.mid.blocks[0]
    h, embedding = torch.randn(2, 16, 4, 4), torch.randn(2, 16)
    assert torch.equal(block(h, embedding), h)
    assert torch.equal(unet.mid.attention(h), h)


def test_initial_projections_do_not_depend_on_the_number_of_blocks():
    """Glorot's bound is sqrt(6 / (fan_in + fan_out)), of each block's own projection."""
    unet = UNet(replace(TINY, num_res_blocks=6))
    first = unet.embedding_projection.weight[:8]  # projection of a block of 8 channels; the embedding has 32
    assert 0.95 * math.sqrt(6 / 40) < first.abs().max() <= math.sqrt(6 / 40)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1])
def test_timestep_embedding(flip, shift):
    t = [0.0, 1.0, 250.5, 999.0]
    out = timestep_embedding(torch.tensor(t, dtype=torch.float64), 10, flip_sin_to_cos=flip, freq_shift=shift)
    for row, step in zip(out.tolist(), t, strict=True):
        angles = [step * 10000 ** (-i / (5 - shift)) for i in range(5)]
        sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        assert row == pytest.approx(cosines + sines if flip else sines + cosines, abs=1e-9)


def test_fourier_embedding():
    values, frequencies = [1.0, 0.5, 999.0], [0.1, -20.0]
    out = fourier_embedding(*(torch.tensor(n, dtype=torch.float64) for n in (values, frequencies)))
    for row, value in zip(out.tolist(), values, strict=True):
        angles = [2 * math.pi * f * math.log(value) for f in frequencies]
        assert row == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-9)


def test_the_output_of_a_fourier_embedding_is_divided_by_the_timestep():
    """Song et al. 2021, appendix H: t times the output depends on t through the embedding alone."""
    unet = randomized(VARIANTS["fourier"])
    unet.time_frequencies.data.zero_()  # the features of each timestep are now the same
    x, _ = inputs(unet.config)
    with torch.no_grad():
        once, twice = (unet(x, torch.full((2,), t)) for t in (100, 200))
    torch.testing.assert_close(once, 2 * twice)


def test_a_centered_input():
    unet = randomized(replace(TINY, center_input=True))
    x, t = inputs(TINY)
    with torch.no_grad():
        torch.testing.assert_close(unet((x + 1) / 2, t), randomized(TINY)(x, t), rtol=1e-4, atol=1e-5)


def test_the_activation_is_that_of_blocks_and_projections():
    """With ReLU, blocks whose norms and embedding are below zero pass on their input alone."""
    unet = randomized(replace(TINY, activation="relu"))
    block = unet.down[0].blocks[0]
    with torch.no_grad():
        block.norm2.weight.zero_()
        block.norm2.bias.fill_(-1)
        h = torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            block(h, torch.zeros(2, 8)), h + block.conv2.bias[:, None, None], rtol=0, atol=1e-6
        )
        unet.time_mlp[2].weight.zero_()
        unet.time_mlp[2].bias.fill_(-1)
        embedding = unet.embed(torch.tensor([3]))
    torch.testing.assert_close(embedding[0], unet.embedding_projection.bias)


def test_vectors_as_labels():
    config = replace(TINY, label_embedding="identity")
    unet = randomized(config)
    x, t = inputs(config)
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    table = randomized(config)
    with torch.no_grad():
        table.time_mlp[2].bias += vectors[1]
        torch.testing.assert_close(unet(x, t, vectors)[1], table(x, t, torch.zeros(2, 32))[1])
    for labels in (None, torch.tensor([0, 1]), vectors[:1]):
        with pytest.raises(ValueError, match=r"labels must be vectors \[2, 32\]"):
            unet(x, t, labels)


@pytest.mark.parametrize("t", [404, -1, 2.5])
def test_timesteps_that_were_not_learned(t):
    unet = randomized(VARIANTS["learned"])
    with pytest.raises(ValueError, match=r"has learned the whole timesteps 0\.\.403 only"):
        unet(inputs(TINY)[0], torch.tensor([t, 3]))


def test_timestep_scale():
    x, t = inputs(TINY)
    scaled = randomized(replace(TINY, timestep_scale=0.25))
    torch.testing.assert_close(scaled(x, 4 * t), randomized(TINY)(x, t))
    torch.testing.assert_close(scaled(x, t), randomized(TINY)(x, t / 4))


def test_labels():
    """labels=None means the null label for every image, and all labels differ."""
    unet = randomized(CONDITIONAL)
    x, t = inputs(CONDITIONAL, batch=1)
    with torch.no_grad():
        outs = [unet(x, t, torch.tensor([label])) for label in range(4)]
        torch.testing.assert_close(unet(x, t), outs[3])
    assert CONDITIONAL.null_label == 3
    for i in range(4):
        for j in range(i):
            assert (outs[i] - outs[j]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name", ["conditional", "no_null_label", "scale_shift", "resblock", "heads", "patches"]
)
def test_gradients_of_each_sample(name):
    """torch.func gives the gradients of a loop."""
    config = replace(VARIANTS[name], num_classes=3)
    unet, (x, t), labels = randomized(config), inputs(config, 3), torch.tensor([0, 2, 1])
    weights = {name: parameter.detach() for name, parameter in unet.named_parameters()}

    def loss(weights, x, t, label):
        output = functional_call(unet, weights, (x[None], t[None], label[None]))
        return output.square().mean()

    found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(weights, x, t, labels)
    for i in range(3):
        one = slice(i, i + 1)
        right = torch.autograd.grad(
            unet(x[one], t[one], labels[one]).square().mean(), list(unet.parameters())
        )
        for name, expected in zip(weights, right, strict=True):
            scale = expected.abs().max()
            assert (found[name][i] - expected).abs().max() <= 1e-4 * scale + 1e-7, name


def test_many_networks_by_vmap():
    """An ensemble: weights are mapped, images and labels are the same."""
    unets = [randomized(CONDITIONAL, seed) for seed in range(3)]
    (x, t), labels = inputs(CONDITIONAL), torch.tensor([0, 3])
    weights, _ = torch.func.stack_module_state(unets)
    with torch.no_grad():
        found = vmap(lambda w: functional_call(unets[0], w, (x, t, labels)))(weights)
        for output, unet in zip(found, unets, strict=True):
            torch.testing.assert_close(output, unet(x, t, labels), rtol=1e-4, atol=1e-4)


def test_unknown_labels_under_vmap():
    unet, (x, t) = randomized(CONDITIONAL), inputs(CONDITIONAL, 3)
    for wrong in (-1, 4):
        labels = torch.tensor([0, wrong, 1])
        with pytest.raises(ValueError, match=r"labels must be in 0\.\.3"):
            vmap(lambda x, t, label: unet(x[None], t[None], label[None]))(x, t, labels)


def test_embedding_can_be_computed_ahead():
    unet = randomized(CONDITIONAL)
    x, t = inputs(CONDITIONAL)
    labels = torch.tensor([1, 3])
    table = unet.embed(torch.arange(1000)[::7], torch.full((143,), 1))
    torch.testing.assert_close(unet.denoise(x, unet.embed(t, labels)), unet(x, t, labels))
    torch.testing.assert_close(
        unet.denoise(x, table[[5, 5]]), unet(x, torch.tensor([35, 35]), torch.tensor([1, 1]))
    )


def test_precisions():
    unet, (x, t) = randomized(TINY), inputs(TINY)
    with torch.no_grad():
        single = unet(x, t)
        double = unet.double()(x, t)
        half = unet.bfloat16()(x, t)
    assert (single.dtype, double.dtype, half.dtype) == (torch.float32, torch.float64, torch.bfloat16)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)
    assert (half.double() - double).abs().max() < 0.1 * double.abs().max()


def test_dropout_in_training_only():
    unet, (x, t) = randomized(replace(TINY, dropout=0.5)), inputs(TINY)
    torch.testing.assert_close(unet(x, t), randomized(TINY)(x, t))
    unet.train()
    assert not torch.equal(unet(x, t), unet(x, t))


def test_other_sizes_than_its_own():
    unet = randomized(TINY)
    x, t = inputs(TINY, size=(12, 6))
    assert unet(x, t).shape == (2, 2, 12, 6)


CONFIGS = {
    "DDPM's": {},
    "adaptive": {
        "scale_shift": True,
        "downsample": "resblock",
        "upsample": "resblock",
        "attention_levels": [2],
    },
    "plain": {
        "downsample": "plain",
        "upsample": ["conv", "plain", "resblock"],
        "num_res_blocks": [1, 3, 2, 1],
    },
    "labels": {"num_classes": 7, "time_embed_dim": 24, "mid_attention_groups": 0, "attention_levels": [0, 3]},
    "no null label": {"num_classes": 7, "has_null_label": False, "mid_attention": False},
    "learned variance": {
        "in_channels": 1,
        "out_channels": 2,
        "channel_mult": [1, 0.5, 3],
        "sample_size": [8, 4],
    },
    "patches": {"patch_size": 2, "num_classes": 3},
    "one level": {"channel_mult": [2], "attention_levels": [], "mid_attention_groups": 4},
    "attention on the way up": {"attention_levels": [0], "up_attention_levels": [1, 2]},
    "no middle": {"has_middle": False},
    "fourier": {"time_embedding": "fourier", "activation": "mish", "center_input": True},
    "learned": {
        "time_embedding": "learned",
        "learned_timesteps": 50,
        "num_classes": 7,
        "has_null_label": False,
        "label_embedding": "timestep",
    },
    "narrow attention": {"head_channels": 12, "narrow_attention": True, "attention_levels": [1, 3]},
    "vectors as labels": {"label_embedding": "identity", "mid_divisor": 2, "activation": "gelu"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_without_building_them(name):
    config = UNetConfig.from_dict({"channels": 16, "norm_groups": 4} | CONFIGS[name])
    with torch.device("meta"):
        unet = UNet(config)
    assert config.num_parameters == sum(p.numel() for p in unet.parameters())


def test_configurations_take_numbers_of_numpy_and_torch():
    config = UNetConfig(
        sample_size=np.array([32, 64]).tolist(),
        channels=np.int64(64),
        channel_mult=[np.float32(1), torch.tensor(2), 2, np.int8(2)],
        norm_eps=np.float64(1e-5),
    )
    assert config == UNetConfig(sample_size=(32, 64), channels=64, channel_mult=(1, 2, 2, 2), norm_eps=1e-5)
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


def test_weights_beyond_memory_are_refused_before_they_are_made(monkeypatch):
    monkeypatch.setattr(memory, "total_memory", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"[0-9,]+ parameters take 0 GiB, and cpu has 0 GiB"):
        UNet(TINY)
    with torch.device("meta"):
        UNet(TINY)


@pytest.mark.slow
def test_compiles_whole():
    unet = randomized(replace(CONDITIONAL, scale_shift=True))
    x, t = inputs(CONDITIONAL)
    labels = torch.tensor([0, 3])
    with torch.no_grad():
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, t, labels), unet(x, t, labels))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 30}, "30x30 cannot be halved 3 times; height and width must be multiples of 8"),
        ({"sample_size": [32, 36]}, "32x36 cannot be halved"),
        ({"sample_size": 0}, r"sample_size must be a whole number in 1..65536, or a list of 2 whole numbers"),
        ({"sample_size": [32]}, "sample_size must be"),
        ({"sample_size": None}, "sample_size must be"),
        ({"sample_size": True}, "sample_size must be"),
        ({"in_channels": 0}, "in_channels must be a whole number in 1..65536, not 0"),
        ({"in_channels": 3.0}, "in_channels must be a whole number"),
        ({"out_channels": "3"}, "out_channels must be a whole number"),
        ({"channels": 33}, "channels must be even"),
        ({"channel_mult": []}, "channel_mult must be"),
        ({"channel_mult": [1, 0]}, r"channel_mult must be a list of numbers in \(0, 1024\], not"),
        ({"channel_mult": [1, math.nan]}, "channel_mult must be"),
        ({"channel_mult": 2}, "channel_mult must be"),
        ({"num_res_blocks": 0}, "num_res_blocks must be a whole number in 1..64, or a list of whole"),
        ({"num_res_blocks": [2, 2]}, "num_res_blocks must be a whole number, or 4"),
        ({"attention_levels": [4]}, r"attention_levels must be in 0\.\.3"),
        ({"attention_levels": [-1]}, "attention_levels must be"),
        ({"mid_attention": 1}, "mid_attention must be true or false"),
        ({"mid_attention_groups": -1}, r"mid_attention_groups must be a whole number in 0..65536, or None"),
        ({"num_heads": 0}, "num_heads must be a whole number in 1..65536"),
        ({"head_channels": 0}, "head_channels must be a whole number in 1"),
        ({"time_embed_dim": 0}, "time_embed_dim must be a whole number in 1"),
        ({"scale_shift": "yes"}, "scale_shift must be true or false"),
        ({"freq_shift": 64}, "freq_shift must be less than half of 128 channels"),
        ({"timestep_scale": 0}, r"timestep_scale must be a number in \(0, 1000\]"),
        ({"downsample": "fir"}, "unknown kind of downsample 'fir'; choose from: conv, resblock, plain"),
        ({"upsample": ["conv"]}, "upsample must be a name, or 3 of them"),
        ({"downsample_padding": 1}, "downsample_padding must be a name"),
        (
            {"downsample_padding": "same"},
            "unknown downsample_padding 'same'; choose from: asymmetric, symmetric",
        ),
        ({"up_attention_levels": [4]}, r"up_attention_levels must be in 0\.\.3"),
        ({"activation": "elu"}, "unknown activation 'elu'; choose from: silu, gelu, mish, relu"),
        ({"time_embedding": "random"}, "unknown time_embedding 'random'"),
        ({"time_embedding": "learned"}, "learned_timesteps must be a number of rows for the time_embedding"),
        ({"learned_timesteps": 9}, "learned_timesteps must be None for the time_embedding 'sinusoidal'"),
        ({"label_embedding": "timestep"}, "label_embedding 'timestep' needs num_classes"),
        ({"label_embedding": "timestep", "num_classes": 3}, "and has no null label"),
        (
            {"label_embedding": "identity", "num_classes": 3},
            "num_classes must be None for the label_embedding",
        ),
        ({"mid_divisor": 0}, r"mid_divisor must be a number in \(0, 1024\]"),
        ({"has_middle": None}, "has_middle must be true or false"),
        ({"norm_groups": 0}, "norm_groups must be a whole number in 1"),
        ({"norm_eps": 0}, r"norm_eps must be a number in \[1e-12, 1\)"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\)"),
        ({"num_classes": 0}, "num_classes must be a whole number in 1"),
        ({"num_res_blocks": 10**30}, "num_res_blocks must be a whole number in 1..64"),
        ({"channel_mult": [10**400]}, "channel_mult must be a list of numbers"),
        ({"channel_mult": [1] * 17}, "channel_mult must be a number for each of 1..16 levels"),
        ({"channel_mult": [0.001, 1, 1, 1]}, "channel_mult must be large enough for a channel"),
        ({"timestep_scale": 1e308}, "timestep_scale must be a number in"),
        ({"norm_eps": 10**400}, "norm_eps must be a number in"),
        ({"norm_eps": "1e-5"}, "norm_eps must be a number in"),
        ({"num_classes": 2**62}, r"num_classes must be a whole number in 1..2\^31-1, or None"),
        ({"num_classes": 2**30}, "has 549,791,560,707 parameters, more than 17,179,869,184"),
        ({"channels": 2**14}, "parameters, more than 17,179,869,184"),
        ({"sample_size": 2**20}, "sample_size must be a whole number in 1..65536"),
        ({"width": 3}, "unknown UNet option 'width'; choose from: sample_size, "),
        ([], "must be a dictionary"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ValueError, match=message) as error:
        UNetConfig.from_dict(options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_groups": 3}, "8 channels cannot be divided into 3 normalisation groups"),
        ({"attention_levels": (1,), "num_heads": 3}, "16 channels cannot be divided into attention heads"),
        ({"head_channels": 5}, "16 channels cannot be divided into attention heads of width 5"),
        (
            {"head_channels": 17, "narrow_attention": True},
            "cannot be divided into attention heads of width 17",
        ),
    ],
)
def test_architectures_that_do_not_divide(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(replace(TINY, **options))


@pytest.mark.parametrize(
    ("config", "call", "message"),
    [
        (TINY, lambda u, x, t: u(x[:, :, :7], t), "7x8 cannot be halved 1 times"),
        (TINY, lambda u, x, t: u(x[:, :1], t), r"x must have shape \[B, 2, H, W\], not \[2, 1, 8, 8\]"),
        (TINY, lambda u, x, t: u(x[0], t), "x must have shape"),
        (TINY, lambda u, x, t: u(x, t[:1]), "embedding must have shape"),
        (TINY, lambda u, x, t: u(x, t[0]), r"timesteps must be a tensor \[B\], a number for each image"),
        (TINY, lambda u, x, t: u(x, t, t), "unconditional"),
        (
            CONDITIONAL,
            lambda u, x, t: u(x, t, torch.tensor([0, 4])),
            r"in 0\.\.3 \(3 for no label\), not 0\.\.4",
        ),
        (CONDITIONAL, lambda u, x, t: u(x, t, torch.tensor([-1, 0])), r"labels must be in 0\.\.3"),
        (CONDITIONAL, lambda u, x, t: u(x, t, torch.tensor([1])), "labels must be integers of shape"),
        (CONDITIONAL, lambda u, x, t: u(x, t, torch.tensor([1.0, 2.0])), "labels must be integers"),
        (VARIANTS["no_null_label"], lambda u, x, t: u(x, t), "trained without a null label"),
        (
            VARIANTS["no_null_label"],
            lambda u, x, t: u(x, t, t.new_tensor([0, 3])),
            r"labels must be in 0\.\.2,",
        ),
    ],
)
def test_bad_calls(config, call, message):
    unet = UNet(config)
    with pytest.raises(ValueError, match=message) as error:
        call(unet, *inputs(config))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("outputs", [1, 3, 5])
def test_outputs_that_no_sampler_has_a_use_for(outputs):
    unet = UNet(replace(TINY, out_channels=outputs))
    with pytest.raises(
        ValueError, match="out_channels of the network must be 2, or 4 for a learned variance"
    ):
        DDPM(unet, NoiseSchedule.linear())
