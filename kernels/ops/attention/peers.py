"""The cases of attention, and what a user of PyTorch alone would call instead."""

import torch.nn.functional as F

from ..._registry import Subject
from .cases import BENCHMARKED, CASES, LARGE


def _attention(case, q, k, v, *, scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


SUBJECTS = {"attention": Subject(CASES | LARGE, _attention, BENCHMARKED, differentiable=True)}
