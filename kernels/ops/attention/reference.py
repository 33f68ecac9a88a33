"""attention in plain PyTorch: what every other backend is tested against."""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..._dispatch import transformed


def attention(q, k, v, *, scale=None) -> torch.Tensor:
    if transformed():  # which PyTorch's fused kernels do not serve
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)
