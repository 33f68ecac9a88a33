"""Small networks of diffusers for the planner, with random weights, and their inputs."""

import torch
from torch import Tensor, nn


def unet2d(**options) -> nn.Module:
    """A UNet2DModel in eval mode."""
    import diffusers

    torch.manual_seed(0)
    small = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DModel(**small | options).eval()


def of_unet2d(batch: int, size: tuple[int, int] = (16, 16)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return {
        "sample": torch.randn(batch, 3, *size, generator=generator),
        "timestep": torch.arange(batch) * 100 + 7,
    }


def conditional(**options) -> nn.Module:
    """A UNet2DConditionModel in eval mode."""
    import diffusers

    torch.manual_seed(0)
    small = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
    }
    return diffusers.UNet2DConditionModel(**small | options).eval()


def of_conditional(
    batch: int, size: tuple[int, int] = (8, 8), positions: int = 7, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Its inputs. positions: of the encoder's states."""
    generator = torch.Generator().manual_seed(batch)
    return {
        "sample": torch.randn(batch, 4, *size, generator=generator).to(dtype),
        "timestep": torch.tensor(437),
        "encoder_hidden_states": torch.randn(batch, positions, 24, generator=generator).to(dtype),
    }
