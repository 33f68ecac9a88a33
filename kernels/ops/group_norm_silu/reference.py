"""group_norm_silu in plain PyTorch, the truth for every other backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._dispatch import vectorised
from .arguments import Arguments
from .library import memory_layout


def group_norm_silu(arguments: Arguments) -> torch.Tensor:
    x, num_groups, weight, bias, eps, add, scale, shift, activation = arguments
    dtype = x.dtype
    layout = torch.contiguous_format if vectorised() else memory_layout(x)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    spatial = (1,) * (x.ndim - 2)

    def per_channel(t: Tensor) -> Tensor:
        return t.to(compute).reshape(*t.shape, *spatial)

    h = x.to(compute)
    if add is not None:
        h = h + per_channel(add)
    # PyTorch's channels_last kernel for the CPU subtracts E[x]^2 from E[x^2], which loses all digits far from
    # 0, and its backward is several times slower than two copies and the contiguous kernel.
    if 0 in h.shape[1:]:  # PyTorch's op refuses empty channels
        for vector in (weight, bias):
            h = h if vector is None else h + vector.to(compute).reshape(-1, *spatial)
    else:
        weight, bias = (None if vector is None else vector.to(compute) for vector in (weight, bias))
        h = torch.group_norm(h.contiguous(), num_groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + per_channel(scale))
    if shift is not None:
        h = h + per_channel(shift)
    if activation == "silu":
        h = F.silu(h)
    return h.to(dtype).contiguous(memory_format=layout)
