"""The cases of attention, and the calls that replace it in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from ..._registry import Subject
from .cases import BENCHMARKED, CASES, LARGE


def _attention(case: object, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


SUBJECTS = {"attention": Subject(CASES | LARGE, _attention, BENCHMARKED, differentiable=True)}
