"""The floating-point operations of a UNet's evaluation, by PyTorch's own count."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffusion import UNet


@torch.no_grad()
def flops_of_unet(unet: UNet) -> int:
    """FLOP of an evaluation of one image in PyTorch's operations, without those of the embedding.

    Attention runs as two products and a softmax, because some versions of PyTorch count no fused kernel.
    """
    config = unet.config
    label = None if config.num_classes is None else torch.zeros(1, dtype=torch.int64)
    embedding = unet.embed(torch.zeros(1), label)
    x = torch.zeros(1, config.in_channels, *config.image_shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        unet.denoise(x, embedding, "reference")
    return counter.get_total_flops()
