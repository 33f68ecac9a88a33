"""The cases of group_norm_silu, and the calls that replace it in plain PyTorch."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..._registry import Subject
from .arguments import Arguments
from .cases import BENCHMARKED, CASES


def group_norm_silu_of_torch(case: object, *args: Any, **options: Any) -> Tensor:
    x, num_groups, weight, bias, eps, add, scale, shift, activation = Arguments(*args, **options)
    spatial = (1,) * (x.ndim - 2)
    if add is not None:
        x = x + add.reshape(*add.shape, *spatial)
    h = F.group_norm(x, num_groups, weight, bias, eps)
    if scale is not None and shift is not None:
        h = h * (1 + scale.reshape(*scale.shape, *spatial)) + shift.reshape(*shift.shape, *spatial)
    return F.silu(h) if activation == "silu" else h


SUBJECTS = {"group_norm_silu": Subject(CASES, group_norm_silu_of_torch, BENCHMARKED, differentiable=True)}
