"""attention as torch.library operators: schemas, fakes and the derivative, the same for every backend.

The compiled libraries implement `fused_diffusion::attention`. A backend in Python registers operators of its
own with the same schemas:

    operator.register("attention_triton", forward, backward)
    out, logsumexp = torch.ops.fused_diffusion.attention_triton(q, k, v, scale)

q, k, v: [B, H, S, D] of one dtype, any strides but a contiguous last dimension (usually views of one
[B, S, 3, H, D] tensor). out, dq, dk and dv: of q's shape and dtype, in the memory of a contiguous
[B, S, H, D], so that merging the heads copies nothing. logsumexp: float32 [B, H, S], the logarithm of the
softmax's denominator, with the maximum added back; it carries no gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._library import Definition, OperatorWithBackward, define

FORWARD = "(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor out, Tensor logsumexp)"
BACKWARD = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp, float scale) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)


def empty_like_heads(q: Tensor) -> Tensor:
    """Uninitialised, of q's shape and dtype, in the memory of a contiguous [B, S, H, D]."""
    batch, heads, positions, width = q.shape
    return q.new_empty((batch, positions, heads, width)).transpose(1, 2)


def _fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return empty_like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_backward(grad: Tensor, q: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like_heads(q), empty_like_heads(q), empty_like_heads(q)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, ctx.scale = inputs
    out, logsumexp = output
    ctx.save_for_backward(q, k, v, out, logsumexp)
    ctx.mark_non_differentiable(logsumexp)
    ctx.set_materialize_grads(False)


def _derivative(run_backward: Callable, ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    if grad.stride(-1) != 1:  # the gradient of a sum, for example, is one number with strides of 0
        grad = grad.clone(memory_format=torch.contiguous_format)
    return *run_backward(grad, *ctx.saved_tensors, ctx.scale), None


operator = OperatorWithBackward(
    op="attention",
    forward=Definition(FORWARD, _fake),
    backward=Definition(BACKWARD, _fake_backward),
    setup_context=_setup_context,
    derivative=_derivative,
)
operator.define("attention")
operator.define(
    "attention_wgmma"
)  # the same, by the instructions of compute capability 9.0 where these serve

# Without a gradient, for networks that are planned for the CPU; calls can be recorded. q, out: [B, H, S, D].
# k, v: [B, H, T, D], T at least 1. All have one dtype, float32, bfloat16 or float16, and any strides but a
# contiguous last dimension; out overlaps no other. fast: products of numbers rounded to bfloat16, where the
# processor multiplies these: in every dtype by AMX, in bfloat16 with AVX512_BF16. Otherwise the products are
# as accurate as float32. The output of an image depends neither on its batch nor on the number of threads.
attention_ = define(
    "attention_", "(Tensor q, Tensor k, Tensor v, float scale, bool fast, Tensor(a!) out) -> ()"
)
