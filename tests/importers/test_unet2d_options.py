"""Every option of UNet2DModel that can be imported, against diffusers' own forward pass."""

import json
import math

import diffusers
import pytest
import torch
from torch import nn

from diffusion.importers.diffusers_unet import convert_weights, unet_config
from diffusion.inference.cpu_plan import unsupported
from diffusion.inference.denoiser_cache import DenoiserCache
from diffusion.models.structure import altered
from diffusion.models.unet import UNet
from helpers.native import requires_native
from helpers.thinning import exhaustive_but
from helpers.unet2d import SMALL, original

THREE = SMALL | {
    "block_out_channels": [16, 16, 32],
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "ResnetDownsampleBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
SCALE_SHIFT = {"resnet_time_scale_shift": "scale_shift"}
OPTIONS = {
    "plain": {},
    "attention on the way down": {"up_block_types": ["UpBlock2D"] * 2},
    "attention on the way up": {"down_block_types": ["DownBlock2D"] * 2},
    "attention on other levels": {"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]},
    "three levels": THREE,
    "three levels by blocks": THREE | {"downsample_type": "resnet", "upsample_type": "resnet"},
    "three levels mixed": THREE | {"downsample_type": "resnet", "upsample_type": "conv", **SCALE_SHIFT},
    "names of 2022": {"down_block_types": ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]},
    "resampling of no name": {"downsample_type": None, "upsample_type": None},
    "gelu": {"act_fn": "gelu"},
    "mish": {"act_fn": "mish"},
    "relu": {"act_fn": "ReLU"},
    "gelu, scaled and shifted": {"act_fn": "gelu", "num_class_embeds": 5, **SCALE_SHIFT},
    "swish": {"act_fn": "swish"},
    "no middle": {"mid_block_type": None},
    "no middle with classes": {"mid_block_type": None, "num_class_embeds": 5, "act_fn": "mish"},
    "centered": {"center_input_sample": True},
    "middle divided": {"mid_block_scale_factor": 1.5},
    "middle divided without attention": {"mid_block_scale_factor": 2**0.5, "add_attention": False},
    "fourier": {"time_embedding_type": "fourier"},
    "fourier with labels": {"time_embedding_type": "fourier", "class_embed_type": "timestep"},
    "learned": {"time_embedding_type": "learned", "num_train_timesteps": 1000},
    "learned with labels": {
        "time_embedding_type": "learned",
        "num_train_timesteps": 1000,
        "class_embed_type": "timestep",
    },
    "labels as timesteps": {"class_embed_type": "timestep"},
    "labels as vectors": {"class_embed_type": "identity"},
    "labels as vectors, embedding": {"class_embed_type": "identity", "time_embedding_dim": 24},
    "no width of heads": {"attention_head_dim": None},
    "heads that do not fill the channels": {"attention_head_dim": 5},
    "wide heads that do not fill the channels": {"attention_head_dim": 12, "act_fn": "gelu"},
    "groups of the middle": {"attn_norm_num_groups": 4},
    "scaled and shifted": SCALE_SHIFT,
    "scaled and shifted, groups of the middle": {"attn_norm_num_groups": 4, **SCALE_SHIFT},
    "no attention": {
        "add_attention": False,
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    },
    "all at once": {
        "center_input_sample": True,
        "time_embedding_type": "learned",
        "num_train_timesteps": 1000,
        "num_class_embeds": 5,
        "sample_size": [12, 20],
        "out_channels": 6,
        "downsample_padding": 0,
        "up_block_types": ["UpBlock2D"] * 2,
        "mid_block_type": None,
    },
}
# Those for which the plan has no operator.
MODULES = {name for name, options in OPTIONS.items() if options.keys() & {"mid_block_scale_factor"}}
MODULES |= {name for name, o in OPTIONS.items() if o.get("act_fn", "swish") != "swish"}


class Exact(nn.Module):
    """Sinusoidal features in float64; diffusers' own are rounded to float32."""

    def __init__(self, channels: int, flip: bool, shift: float):
        super().__init__()
        self.half, self.flip, self.shift = channels // 2, flip, shift

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        exponents = torch.arange(self.half, dtype=torch.float64) / (self.half - self.shift)
        angles = t.double()[:, None] * 10000**-exponents
        waves = [angles.sin(), angles.cos()]
        return torch.cat(waves[::-1] if self.flip else waves, dim=1)


def pair(options: dict) -> tuple[diffusers.UNet2DModel, UNet]:
    model = original(SMALL | options)
    config = unet_config(json.loads(model.to_json_string()))
    unet = UNet(config).eval()
    unet.load_state_dict(convert_weights(config, model.state_dict()))
    return model, unet


def inputs(unet: UNet, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    config, generator = unet.config, torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, *config.image_shape, generator=generator).to(dtype)
    if config.label_embedding == "identity":
        return x, torch.randn(2, unet.time_mlp[2].out_features, generator=generator).to(dtype)
    return x, torch.tensor([1, 3]) if config.num_classes else None


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert expected.std() > 1e-4
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", exhaustive_but(OPTIONS, default=list(OPTIONS)[::3]))
def test_modules_in_float32(name):
    model, unet = pair(OPTIONS[name])
    x, labels = inputs(unet, torch.float32)
    with torch.no_grad():
        for t in (torch.tensor([1, 2]), torch.tensor([998, 537])):
            expected = model(x, t, class_labels=labels).sample
            assert relative(unet(x, t, labels), expected) <= 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_modules_in_float64(name):
    model, unet = pair(OPTIONS[name])
    model, unet = model.double(), unet.double()
    if unet.config.time_embedding == "sinusoidal":
        model.time_proj = Exact(unet.config.channels, unet.config.flip_sin_to_cos, unet.config.freq_shift)
    x, labels = inputs(unet, torch.float64)
    t, theirs = torch.tensor([998, 3]), labels
    if unet.config.time_embedding == "fourier":  # torch.log of integers is in float32
        t, theirs = t.double(), None if labels is None else labels.double()
    with torch.no_grad():
        expected = model(x, t, class_labels=theirs).sample
        assert relative(unet(x, t, labels), expected) <= 1e-10


@requires_native
@pytest.mark.parametrize("name", exhaustive_but(OPTIONS, default=list(OPTIONS)[::2]))
def test_as_it_samples(name):
    """By the plan where it has the operators, and by the modules, with the reason, where it lacks one."""
    model, unet = pair(OPTIONS[name])
    assert altered(unet) is None
    reason = unsupported(unet, torch.float32)
    assert (reason is not None) == (name in MODULES)
    x, labels = inputs(unet, torch.float32)
    device = torch.device("cpu")
    with torch.no_grad():
        denoiser = DenoiserCache().get(unet, device, torch.float32, "auto")
        for t in (torch.tensor([1, 2]), torch.tensor([998, 537])):
            expected = model(x, t, class_labels=labels).sample
            assert relative(denoiser(x, t, labels), expected) <= 1e-5


@pytest.mark.parametrize("name", OPTIONS)
def test_parameters_are_counted(name):
    """Ours are those of diffusers: each weight has its place."""
    model, unet = pair(OPTIONS[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert unet.config.num_parameters == count == sum(p.numel() for p in unet.parameters())


def test_the_frequencies_are_those_of_the_file():
    model, unet = pair({"time_embedding_type": "fourier"})
    features = unet._time_features(torch.tensor([7.0]))
    angles = 2 * math.pi * math.log(7.0) * model.time_proj.weight.double()
    expected = torch.cat([angles.sin(), angles.cos()])[None].float()
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)
