"""Small UNets of every kind."""

from dataclasses import replace

import torch

from diffusion.models.unet import UNet, UNetConfig

TINY = UNetConfig(
    sample_size=8,
    in_channels=2,
    out_channels=2,
    channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    norm_groups=4,
)

CONDITIONAL = replace(TINY, num_classes=3)


def randomized(config: UNetConfig, seed: int = 0) -> UNet:
    """The same UNet for the same seed, in which no weight is zero."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        unet = UNet(config).eval()
        for parameter in unet.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return unet


def inputs(config: UNetConfig, batch: int = 2, size=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, config.in_channels, *(size or config.image_shape), generator=generator)
    return x, torch.arange(batch) * 400 + 3


VARIANTS = {
    "tiny": TINY,
    "conditional": CONDITIONAL,
    "no_null_label": replace(CONDITIONAL, has_null_label=False),
    "scale_shift": replace(TINY, scale_shift=True),
    "resblock": replace(TINY, downsample="resblock", upsample="resblock"),
    "plain": replace(TINY, downsample="plain", upsample="plain"),
    "mixed": replace(
        TINY, channel_mult=(1, 2, 2), downsample=("conv", "plain"), upsample=("plain", "resblock")
    ),
    "symmetric": replace(TINY, downsample_padding="symmetric"),
    "heads": replace(TINY, attention_levels=(0, 1), num_heads=2),
    "head_channels": replace(TINY, attention_levels=(0, 1), head_channels=4),
    "no_attention": replace(TINY, attention_levels=(), mid_attention=False),
    "bare_mid_attention": replace(TINY, mid_attention_groups=0),
    "mid_groups": replace(TINY, mid_attention_groups=2),
    "blocks_per_level": replace(TINY, channel_mult=(1, 1.5, 2), num_res_blocks=(1, 3, 2)),
    "one_level": replace(TINY, channel_mult=(2,), attention_levels=(0,)),
    "learned_variance": replace(TINY, out_channels=4),
    "embedding": replace(TINY, flip_sin_to_cos=True, freq_shift=0, time_embed_dim=12, timestep_scale=0.25),
    "oblong": replace(TINY, sample_size=(8, 12)),
    "input_width": replace(TINY, channel_mult=(2, 1), input_width=8),
    "patches": replace(TINY, patch_size=2),
    "oblong_patches": replace(TINY, sample_size=(8, 16), patch_size=4, channel_mult=(1, 1)),
    "up_attention": replace(TINY, attention_levels=(1,), up_attention_levels=(0,)),
    "no_up_attention": replace(TINY, attention_levels=(0, 1), up_attention_levels=()),
    "no_middle": replace(TINY, has_middle=False),
    "center_input": replace(TINY, center_input=True, patch_size=2),
    "fourier": replace(TINY, time_embedding="fourier"),
    "learned": replace(TINY, time_embedding="learned", learned_timesteps=404),
    "narrow_attention": replace(TINY, attention_levels=(0, 1), head_channels=3, narrow_attention=True),
    "label_timestep": replace(CONDITIONAL, label_embedding="timestep", has_null_label=False),
}
# Those that no plan supports, with the reason.
UNPLANNED = {
    "gelu": (replace(TINY, activation="gelu"), "its activation is gelu"),
    "mish": (replace(TINY, activation="mish", scale_shift=True), "its activation is mish"),
    "relu": (replace(TINY, activation="relu"), "its activation is relu"),
    "mid_divisor": (replace(TINY, mid_divisor=1.5), "its middle blocks are divided by 1.5"),
}
