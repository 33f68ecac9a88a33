"""group_norm_silu as torch.library operators: schemas, fakes and the derivative, the same for every backend.

`fused_diffusion::group_norm_silu` is implemented by the compiled libraries. A backend in Python registers
operators of its own with the same schemas:

    register("group_norm_silu_triton", forward, backward)
    y, mean, rstd = torch.ops.fused_diffusion.group_norm_silu_triton(
        x, num_groups, weight, bias, eps, add, scale, shift, silu)

x: [N, C, *spatial], contiguous or channels_last, and y like it. mean, rstd: float64 and float32 [N, G], of
x + add; they carry no gradient; rounded to float32, a mean far from 0 would cost the gradient digits. The
backward operator gives dx, and for each sample and channel three sums over space, float32 [N, C]: of dz, the
gradient of what goes into the activation; of dz times the normalised x; and of dx. All other gradients follow
from these.
"""

from collections.abc import Callable

import torch
from torch import Tensor

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
    """contiguous_format, or the layout in which channels lie side by side."""
    for ndim, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if x.ndim == ndim and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return layout
    return torch.contiguous_format


def in_a_layout(x: Tensor) -> Tensor:
    """x as it is where it is contiguous or channels_last; else a contiguous copy."""
    return x.contiguous(memory_format=memory_layout(x))


def empty_like_x(x: Tensor) -> Tensor:
    """Uninitialised, of x's shape, dtype and layout."""
    return torch.empty_like(x, memory_format=memory_layout(x))


def _fake(x, num_groups, weight, bias, eps, add, scale, shift, silu):
    statistics = (x.shape[0], num_groups)
    mean, rstd = (x.new_empty(statistics, dtype=dtype) for dtype in (torch.float64, torch.float32))
    return empty_like_x(x), mean, rstd


def _fake_backward(grad, x, num_groups, weight, bias, add, scale, shift, silu, mean, rstd):
    sums = [x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(3)]
    return empty_like_x(x), *sums


def _setup_context(ctx, inputs, output):
    x, ctx.num_groups, weight, bias, _, add, scale, shift, ctx.silu = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, bias, add, scale, shift, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("the gradient of group_norm_silu cannot be differentiated again")


def define(name: str) -> None:
    """Defines fused_diffusion::<name> and fused_diffusion::<name>_backward, as yet without kernels."""
    forward, backward = f"fused_diffusion::{name}", f"fused_diffusion::{name}_backward"
    torch.library.define(forward, FORWARD)
    torch.library.define(backward, BACKWARD)
    torch.library.register_fake(forward, _fake)
    torch.library.register_fake(backward, _fake_backward)
    run_backward = getattr(torch.ops.fused_diffusion, f"{name}_backward")

    def derivative(ctx, grad, *_):
        x, weight, bias, add, scale, shift, mean, rstd = ctx.saved_tensors
        grad = grad.contiguous(memory_format=memory_layout(x))
        dx, sum_dz, sum_dz_xhat, sum_dx = run_backward(
            grad, x, ctx.num_groups, weight, bias, add, scale, shift, ctx.silu, mean, rstd
        )

        def wanted(position: int, like: Tensor | None, gradient: Callable[[], Tensor]) -> Tensor | None:
            return gradient().to(like.dtype) if ctx.needs_input_grad[position] else None

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

    torch.library.register_autograd(forward, derivative, setup_context=_setup_context)
    torch.library.register_autograd(backward, _no_second_derivative)


def register(name: str, forward: Callable, backward: Callable) -> None:
    """Defines both operators and implements them in Python, on the CPU and on CUDA devices."""
    define(name)
    torch.library.impl(f"fused_diffusion::{name}", ("cpu", "cuda"), forward)
    torch.library.impl(f"fused_diffusion::{name}_backward", ("cpu", "cuda"), backward)


define("group_norm_silu")
