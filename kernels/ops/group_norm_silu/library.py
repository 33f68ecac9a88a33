"""group_norm_silu as torch.library operators: schemas, fakes and the derivative, the same for every backend.

The compiled libraries implement `fused_diffusion::group_norm_silu`. A backend in Python registers operators
of its own with the same schemas:

    operator.register("group_norm_silu_triton", forward, backward)
    y, mean, rstd = torch.ops.fused_diffusion.group_norm_silu_triton(
        x, num_groups, weight, bias, eps, add, scale, shift, silu)

x: [N, C, *spatial], contiguous or channels_last, and y like it. mean, rstd: float64 and float32 [N, G], of
x + add. Not differentiable. mean is float64 because a float32 mean far from 0 would lose digits in the
gradient. The backward operator returns dx, and for each sample and channel three sums over space, float32
[N, C]: of dz, the gradient of the activation's input; of dz times the normalised x; and of dx. All other
gradients follow from these.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._library import Definition, OperatorWithBackward, define

FORWARD = (
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, bool silu) -> (Tensor y, Tensor mean, Tensor rstd)"
)
BACKWARD = (
    "(Tensor grad, Tensor x, int num_groups, Tensor? weight, Tensor? bias, Tensor? add, Tensor? scale, "
    "Tensor? shift, bool silu, Tensor mean, Tensor rstd) "
    "-> (Tensor dx, Tensor sum_dz, Tensor sum_dz_xhat, Tensor sum_dx)"
)


def memory_layout(x: Tensor) -> torch.memory_format:
    """channels_last or channels_last_3d if x is stored so and not contiguous, else contiguous_format."""
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return layout
    return torch.contiguous_format


def as_supported_layout(x: Tensor) -> Tensor:
    """x itself if it is contiguous or channels_last, else a contiguous copy."""
    return x.contiguous(memory_format=memory_layout(x))


def empty_like_x(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape, dtype and layout."""
    return torch.empty_like(x, memory_format=memory_layout(x))


def _fake(x: Tensor, num_groups: int, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    statistics = (x.shape[0], num_groups)
    mean, rstd = (x.new_empty(statistics, dtype=dtype) for dtype in (torch.float64, torch.float32))
    return empty_like_x(x), mean, rstd


def _fake_backward(grad: Tensor, x: Tensor, *_: object) -> tuple[Tensor, ...]:
    sums = [x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(3)]
    return empty_like_x(x), *sums


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, ctx.num_groups, weight, bias, _, add, scale, shift, ctx.silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, add, scale, shift, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _derivative(run_backward: Callable, ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
    x, weight, bias, add, scale, shift, mean, rstd = ctx.saved_tensors
    grad = grad.contiguous(memory_format=memory_layout(x))
    dx, sum_dz, sum_dz_xhat, sum_dx = run_backward(
        grad, x, ctx.num_groups, weight, bias, add, scale, shift, ctx.silu, mean, rstd
    )

    def wanted(position: int, like: Tensor | None, gradient: Callable[[], Tensor]) -> Tensor | None:
        if like is None or not ctx.needs_input_grad[position]:
            return None
        return gradient().to(like.dtype)

    def d_scale() -> Tensor:
        affine = sum_dz_xhat if weight is None else weight.float() * sum_dz_xhat
        return affine if bias is None else affine + bias.float() * sum_dz

    gain = 1 if scale is None else 1 + scale.float()
    return (
        dx,
        None,
        wanted(2, weight, lambda: (gain * sum_dz_xhat).sum(0)),
        wanted(3, bias, lambda: (gain * sum_dz).sum(0)),
        None,
        wanted(5, add, lambda: sum_dx),
        wanted(6, scale, d_scale),
        wanted(7, shift, lambda: sum_dz),
        None,
    )


operator = OperatorWithBackward(
    op="group_norm_silu",
    forward=Definition(FORWARD, _fake),
    backward=Definition(BACKWARD, _fake_backward),
    setup_context=_setup_context,
    derivative=_derivative,
)
operator.define("group_norm_silu")

# A normalisation as one affine function of each channel, for an op that applies it to its input
# (csrc/group_norm_silu/norm_cpu.h). x: [N, C, ...] in channels_last, or a range of the channels of such a
# tensor. affine: float32 [3, N, C] or [4, N, C]: centre, gain, offset and bound. The activation's input is
# (x - centre) * gain + offset; with SiLU, gain and offset are multiplied by -log2(e). bound: an upper bound
# of a channel's magnitudes after the activation, which a convolution by int8 limbs needs.
group_norm_affine_ = define(
    "group_norm_affine_",
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, bool silu, Tensor(a!) affine) -> ()",
)
