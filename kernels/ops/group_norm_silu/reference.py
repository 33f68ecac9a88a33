"""group_norm_silu in plain PyTorch: what every other backend is tested against."""

import torch
import torch.nn.functional as F

from ..._dispatch import vectorised


def _layout(x: torch.Tensor) -> torch.memory_format:
    """The memory layout that the output has to have."""
    if vectorised():
        return torch.contiguous_format
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return layout
    return torch.contiguous_format


def group_norm_silu(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
) -> torch.Tensor:
    dtype, layout = x.dtype, _layout(x)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    spatial = (1,) * (x.ndim - 2)

    def cast(t):
        return None if t is None else t.to(compute)

    def per_channel(t):
        return t.to(compute).reshape(*t.shape, *spatial)

    h = x.to(compute)
    if add is not None:
        h = h + per_channel(add)
    # PyTorch's channels_last kernel for the CPU subtracts E[x]^2 from E[x^2], which is wrong off centre, and
    # its backward is several times slower than two copies and the contiguous one.
    if 0 in h.shape[1:]:  # which PyTorch's op refuses
        for vector in (weight, bias):
            h = h if vector is None else h + cast(vector).reshape(-1, *spatial)
    else:
        h = torch.group_norm(h.contiguous(), num_groups, cast(weight), cast(bias), eps)
    if scale is not None:
        h = h * (1 + per_channel(scale))
    if shift is not None:
        h = h + per_channel(shift)
    if activation == "silu":
        h = F.silu(h)
    return h.to(dtype).contiguous(memory_format=layout)
