"""Multi-head self-attention over the positions of a feature map."""

import torch

from ..._arguments import check_number, check_tensors
from ..._dispatch import Backend, Op, always
from . import native, reference, triton_launch


def _validate(q, k, v, *, scale=None) -> None:
    check_tensors("attention", q=q, k=k, v=v)
    if scale is not None:
        check_number("scale", scale)
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"attention needs q, k and v of one shape [B, heads, S, D], not {shapes}")
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"attention needs q, k and v of one floating-point dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise ValueError(f"attention: {name} is on {tensor.device}, not on q's {q.device}")


op = Op(
    "attention",
    {
        "cuda": Backend(native.attention, native.supports_cuda),
        "triton": Backend(triton_launch.attention, triton_launch.supports),
        "cpp": Backend(native.attention, native.supports_cpp, native.slower_cpp),
        "reference": Backend(reference.attention, always),
    },
    _validate,
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

    q, k, v: [B, heads, S, D], one shape and floating-point dtype. scale: default 1 / sqrt(D).
    Returns [B, heads, S, D] in q's dtype; the softmax is in float32 (float64 for float64).
    ValueError: shapes or dtypes that do not fit, or a backend that cannot serve the call; TypeError: what is
    no tensor or number. Forward-mode derivatives and torch.func are the reference's.
    """
    return op(q, k, v, scale=scale, backend=backend)
