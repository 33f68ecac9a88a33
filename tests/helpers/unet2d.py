"""Small UNet2DModels of diffusers with random weights."""

import diffusers
import torch

SMALL = {
    "sample_size": 16,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def original(config: dict) -> diffusers.UNet2DModel:
    """A UNet2DModel in which all parameters are random, none at zero or one, and outputs are of order one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = diffusers.UNet2DModel(**config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2)
    return model
