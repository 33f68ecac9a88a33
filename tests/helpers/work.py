"""The size of a UNet and the work of its evaluation, which pages of the documentation state."""

import sys

from diffusion import UNet, UNetConfig

from .paths import ROOT

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks.flops import flops_of_unet


def size_and_flops(config: UNetConfig) -> tuple[int, int]:
    """The number of parameters, and PyTorch's count of the operations for an image."""
    unet = UNet(config).eval()
    return sum(parameter.numel() for parameter in unet.parameters()), flops_of_unet(unet)
