"""conv3x3 in plain PyTorch: what every other backend is tested against."""

import torch
import torch.nn.functional as F

from ..group_norm_silu.reference import group_norm_silu
from .packing import PackedWeight


def conv3x3(
    x,
    weight,
    bias=None,
    *,
    num_groups=None,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    add=None,
    scale=None,
    shift=None,
    activation="none",
    residual=None,
    upsample=False,
) -> torch.Tensor:
    if isinstance(weight, PackedWeight):
        weight = weight.weight
    h = x
    if num_groups is not None:
        h = group_norm_silu(
            x,
            num_groups,
            norm_weight,
            norm_bias,
            eps,
            add=add,
            scale=scale,
            shift=shift,
            activation=activation,
        )
    bias = None if bias is None else bias.to(h.dtype)
    if 0 in (len(weight), *h.shape[2:]):  # which PyTorch's ops refuse
        h = h.repeat_interleave(2, 2).repeat_interleave(2, 3) if upsample else h
        h = torch.einsum("nchw,kcij->nkhw", h, weight.to(h.dtype))
        h = h if bias is None else h + bias[:, None, None]
    else:
        h = F.interpolate(h, scale_factor=2.0, mode="nearest") if upsample else h
        h = F.conv2d(h, weight.to(h.dtype), bias, padding=1)
    return h if residual is None else h + residual.to(h.dtype)
