"""attention in plain PyTorch, the truth for every other backend."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..._dispatch import transformed
from .arguments import Arguments


def attention(arguments: Arguments) -> torch.Tensor:
    q, k, v, scale = arguments
    if transformed():  # PyTorch's fused kernels do not serve transforms
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)
