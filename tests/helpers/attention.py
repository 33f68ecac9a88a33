"""The definition of attention, PyTorch's own, and both with gradients."""

import torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def formula(q, k, v, *, scale=None):
    """Vaswani et al. 2017, equation 1."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bhsd,bhtd->bhst", q, k) * scale
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return torch.einsum("bhst,bhtd->bhsd", weights / weights.sum(-1, keepdim=True), v)


def torch_ops(q, k, v, *, scale=None):
    """Attention in PyTorch's own ops, in q's dtype."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q @ k.transpose(-1, -2)) * scale).softmax(-1) @ v


def upstream(out):
    """A gradient of the output: the same numbers in every dtype that holds these sixteenths."""
    numbers = torch.arange(out.numel(), device=out.device) * 7 % 31 - 15
    return (numbers.reshape(out.shape) / 16).to(out.dtype)


def with_gradients(function, args, dtype=None):
    """(out, dq, dk, dv), where `function` is called with leaves of the same strides."""
    leaves = [t.detach().to(dtype or t.dtype, copy=False).requires_grad_() for t in args]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream(out))
