"""A convolution for training: PyTorch's own, with a faster gradient of its weight where there is one."""

import torch

from ..._arguments import check_integer, check_tensors
from ..._dispatch import Backend, Op, always
from . import conv2d_reference, weight_gradient


def _validate(x, weight, bias=None, *, stride=1, padding=0) -> None:
    check_tensors("conv2d", {"bias": bias}, x=x, weight=weight)
    check_integer("stride", stride)
    check_integer("padding", padding)
    if stride < 1 or padding < 0:
        raise ValueError(f"conv2d: stride must be at least 1 and padding 0, not {stride} and {padding}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"conv2d needs a floating-point x [N, C, H, W], not {x.dtype} {list(x.shape)}")
    if weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"conv2d: weight must be [K, {x.shape[1]}, R, S], not {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"conv2d: bias must have shape [{len(weight)}], not {list(bias.shape)}")


op = Op(
    "conv2d",
    {
        "cpp": Backend(weight_gradient.conv2d, weight_gradient.supports, weight_gradient.slower),
        "reference": Backend(conv2d_reference.conv2d, always),
    },
    _validate,
)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """`torch.nn.functional.conv2d(x, weight, bias, stride, padding)`, differentiable.

    x: [N, C, H, W]. weight: [K, C, R, S]. bias: [K]. Returns [N, K, H', W'] in x's dtype, or autocast's.
    The C++ backend, for bfloat16 on processors with AMX, sums the gradients of weight and bias in float32 and
    gives them in the dtype of those; an infinity or NaN in its way makes NaN of at least what depends on it.
    ValueError: shapes that do not fit, or a backend that cannot serve the call; TypeError: what is no tensor
    or integer. Forward-mode derivatives and torch.func are the reference's.
    """
    return op(x, weight, bias, stride=stride, padding=padding, backend=backend)
