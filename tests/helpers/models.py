"""Small models with random weights, which every test can afford to run."""

import torch

from diffusion import DDPM, NoiseSchedule, UNet, UNetConfig


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
