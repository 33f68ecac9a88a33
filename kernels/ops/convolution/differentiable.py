"""A convolution for training: PyTorch's own, with a faster gradient of its weight where there is one."""

import torch

from ..._dispatch import Backend, Op, always
from . import reference, weight_gradient
from .arguments import Conv2dArguments, validate_conv2d

op = Op(
    "conv2d",
    {
        "cpp": Backend(weight_gradient.conv2d, weight_gradient.supports, weight_gradient.slower),
        "reference": Backend(reference.conv2d, always),
    },
    validate_conv2d,
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

    x: [N, C, H, W].
    weight: [K, C, R, S].
    bias: [K].
    stride: at least 1. padding: at least 0, of zeros on every side.
    Returns [N, K, H', W'] in x's dtype, or autocast's. The C++ backend, for bfloat16 on processors with AMX,
    sums the gradients of weight and bias in float32 and returns them in the dtypes of weight and bias. A
    non-finite input gives NaN in every gradient that depends on it, perhaps in more. ValueError: shapes
    that do not fit, or a backend that cannot serve the call. TypeError: an argument of another type.
    Forward-mode derivatives and torch.func are the reference's.
    """
    return op(Conv2dArguments(x, weight, bias, stride, padding), backend)
