"""The definition of group_norm_silu, PyTorch's own ops, and both with gradients."""

import math

import torch
import torch.nn.functional as F

from diffusion.kernels.ops.group_norm_silu.cases import CASES
from helpers.tensors import cast
from helpers.tolerance import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALL = [name for name, case in CASES.items() if math.prod(case.shape) <= 4096]


def over_space(t, x):
    return t.reshape(*t.shape, *(1,) * (x.ndim - 2))


def formula(x, num_groups, weight, bias, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"):
    """Wu & He 2018, equation 2, as written, then modulation and x * sigmoid(x)."""
    if add is not None:
        x = x + over_space(add, x)
    h = x.reshape(len(x), num_groups, math.prod(x.shape[1:]) // num_groups)
    mean = h.mean(-1, keepdim=True)
    variance = ((h - mean) ** 2).mean(-1, keepdim=True)
    y = ((h - mean) / torch.sqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        y = y * over_space(weight, x) + over_space(bias, x)
    if scale is not None:
        y = y * (1 + over_space(scale, x)) + over_space(shift, x)
    return y / (1 + torch.exp(-y)) if activation == "silu" else y


def torch_ops(x, num_groups, weight, bias, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"):
    """group_norm_silu in PyTorch's own ops, in x's dtype and contiguous."""
    h = x.contiguous() if add is None else (x + over_space(add, x)).contiguous()
    h = torch.group_norm(h, num_groups, weight, bias, eps)
    if scale is not None:
        h = h * (1 + over_space(scale, x)) + over_space(shift, x)
    return F.silu(h) if activation == "silu" else h


def upstream(out):
    """A gradient of the output: the same numbers in every dtype, laid out like the output."""
    numbers = torch.arange(out.numel(), device=out.device) * 7 % 31 - 15
    gradient = torch.empty_like(out)
    return gradient.copy_((numbers / 16).reshape(out.shape))


def with_gradients(function, args, kwargs, **options):
    """The output and its gradient by every tensor, where `function` is called with leaves."""

    def leaf(t):
        return t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t

    args, kwargs = tuple(map(leaf, args)), {name: leaf(t) for name, t in kwargs.items()}
    leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    out = function(*args, **kwargs, **options)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream(out))


def assert_together_close(calls):
    """The rule for the numbers of several calls of one kind together; each is (actual, args, kwargs)."""
    actual = [call[0] for call in calls]
    peer = [with_gradients(torch_ops, *call[1:]) for call in calls]
    expected = [with_gradients(formula, *cast(*call[1:], torch.float64)) for call in calls]
    tensors = (
        (torch.stack(each) for each in zip(*results, strict=True)) for results in (actual, peer, expected)
    )
    for one, other, truth in zip(*tensors, strict=True):
        assert one.dtype == other.dtype
        assert_close(one, other, truth)


def assert_all_close(actual, args, kwargs):
    assert_together_close([(actual, args, kwargs)])
