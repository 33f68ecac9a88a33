"""The exported UNet computes what the package's does: diffusers' UNet2DModel with its weights says so."""

import dataclasses
import inspect
from dataclasses import replace

import diffusers
import pytest
import torch

from diffusion.exporters import unet2d
from diffusion.exporters.unet2d import unet2d_config, unet2d_weights
from diffusion.importers import diffusers_unet as importer
from diffusion.models.unet import UNet, UNetConfig
from helpers.unets import CONDITIONAL, TINY, UNPLANNED, VARIANTS, inputs, randomized

REFUSED = {
    "patches": "patch_size=2",
    "oblong_patches": "patch_size=4",
    "input_width": "input_width=8",
    "center_input": "patch_size=2",
    "embedding": "timestep_scale=0.25",
    "one_level": r"channel_mult=\[2\]",
    "blocks_per_level": r"num_res_blocks=\[1, 3, 2\]",
    "bare_mid_attention": "mid_attention_groups=0",
    "heads": "num_heads=2",
}
CONFIGS = {name: config for name, config in VARIANTS.items() if name not in REFUSED}
CONFIGS |= {name: config for name, (config, _) in UNPLANNED.items()}
CONFIGS |= {
    "center_input": replace(TINY, center_input=True),
    "vectors as labels": replace(TINY, label_embedding="identity"),
    "num_heads": replace(TINY, num_heads=2),
    "num_heads_without_attention": replace(TINY, attention_levels=(), mid_attention=False, num_heads=2),
    "scale_shift_bare_mid": replace(TINY, scale_shift=True, mid_attention_groups=0),
    "attention_and_resblocks": replace(
        TINY, attention_levels=(0,), downsample="resblock", upsample="resblock", scale_shift=True
    ),
    "partly_resblocks": replace(
        TINY, channel_mult=(1, 2, 2), downsample=("resblock", "conv"), upsample=("conv", "resblock")
    ),
    "plain_symmetric": replace(TINY, downsample="plain", upsample="plain", downsample_padding="symmetric"),
    "plain_attention": replace(TINY, attention_levels=(0, 1), downsample="plain", upsample="plain"),
    "embedding_width": replace(TINY, time_embed_dim=12, flip_sin_to_cos=True, freq_shift=0.5),
    "eps_dropout": replace(TINY, norm_eps=1e-3, norm_groups=2, dropout=0.1),
    "odd_widths": replace(TINY, channels=12, channel_mult=(1, 5 / 3), num_res_blocks=2),
}


def test_every_option_is_exported_or_refused():
    """An option that is not named in the exporter would be lost silently."""
    source = inspect.getsource(unet2d)
    fields = {field.name for field in dataclasses.fields(UNetConfig)}
    derived = {"attention_levels", "up_attention_levels", "downsample", "upsample", "num_res_blocks"}
    derived |= {"narrow_attention"}  # a UNet2DModel always narrows
    assert {name for name in fields - derived if f"config.{name}" not in source} == set()


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_computes_the_same(name):
    config = CONFIGS[name]
    unet = randomized(config)
    options = unet2d_config(config)
    original = diffusers.UNet2DModel.from_config(options).eval()
    weights = unet2d_weights(config, unet.state_dict())
    original.load_state_dict(weights)  # no name is missing and none too many
    x, t = inputs(config)
    labels = None if config.num_classes is None else torch.tensor([2, config.null_label or 0])
    if config.label_embedding == "identity":
        labels = torch.ones(2, config.time_embed_dim or 4 * config.channels)
    with torch.no_grad():
        expected = original(x, t, class_labels=labels).sample
        found = unet(x, t, labels)
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_import_of_an_export_has_the_same_bits(name):
    config = CONFIGS[name]
    unet = randomized(config)
    again = importer.unet_config(unet2d_config(config))
    back = UNet(again).eval()
    back.load_state_dict(importer.convert_weights(again, unet2d_weights(config, unet.state_dict())))
    x, t = inputs(config)
    labels = None if config.num_classes is None else torch.tensor([2, config.null_label or 0])
    if config.label_embedding == "identity":
        labels = torch.ones(2, config.time_embed_dim or 4 * config.channels)
    with torch.no_grad():
        difference = (back(x, t, labels) - unet(x, t, labels)).abs().max()
    plain = "plain" in (*config.level_downsample, *config.level_upsample)
    assert difference <= (1e-6 if plain else 0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_diffusers_cannot_express_is_named(name):
    with pytest.raises(ValueError, match=f"{REFUSED[name]} cannot be exported: diffusers' UNet2DModel has"):
        unet2d_config(VARIANTS[name])


def test_mixed_resampling_at_levels_with_attention():
    config = replace(
        TINY,
        channel_mult=(1, 2, 2),
        attention_levels=(0, 1),
        downsample=("conv", "resblock"),
        upsample="conv",
    )
    with pytest.raises(ValueError, match=r"downsample=\['conv', 'resblock'\] cannot be exported"):
        unet2d_config(config)


def test_a_null_label_is_one_more_row():
    assert unet2d_config(CONDITIONAL)["num_class_embeds"] == 4
    assert unet2d_config(replace(CONDITIONAL, has_null_label=False))["num_class_embeds"] == 3
