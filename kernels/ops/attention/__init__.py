"""Multi-head self-attention over the positions of a feature map."""

import torch

from ..._dispatch import Backend, Op, always
from ..._registry import InternalOp, PublicOp
from . import native, reference, triton_launch
from .arguments import Arguments, validate

__all__ = ["attention"]

op = Op(
    "attention",
    {
        "cuda": Backend(native.attention_on_cuda, native.supports_cuda, manner=native.manner_of_cuda),
        "triton": Backend(triton_launch.attention, triton_launch.supports),
        "cpp": Backend(native.attention, native.supports_cpp, native.slower_cpp),
        "reference": Backend(reference.attention, always),
    },
    validate,
)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """`softmax(q k^T * scale) v`, differentiable (Vaswani et al. 2017, arXiv:1706.03762, equation 1).

    q, k, v: [B, heads, S, D], of one shape and floating-point dtype.
    scale: default 1 / sqrt(D).
    Returns [B, heads, S, D] in q's dtype; the softmax is in float32 (float64 for float64).
    ValueError: shapes or dtypes that do not fit, or a backend that cannot serve the call. TypeError: an
    argument of another type. Forward-mode derivatives and torch.func are the reference's.
    """
    return op(Arguments(q, k, v, scale), backend)


def _example(device: str) -> Arguments:
    tokens = torch.zeros(2, 1, 64, 32, device=device)
    return Arguments(tokens, tokens, tokens)


OPS = (PublicOp(attention, op, Arguments, _example),)
INTERNAL = (InternalOp("attention_"),)
