"""conv2d whose weight gets its gradient from csrc/convolution/weight_gradient.cpp."""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _native
from .arguments import Conv2dArguments
from .library import convolution_weight_gradient

MANNER = "the gradient of the weight by AMX"


def supports(arguments: Conv2dArguments) -> str | None:
    x, weight, bias, stride, padding = arguments
    if _native.simd_in_use() != "amx":
        return "this processor has no AMX"
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        if torch.float64 in dtypes:
            return "autocast leaves float64 as it is"
    elif dtypes != {torch.bfloat16}:
        return "it multiplies in bfloat16"
    side = weight.shape[-1]
    if side not in (1, 3) or weight.shape[2] != side or stride > 2 or padding >= side:
        return "it is for kernels of 1 x 1 and 3 x 3 with a stride of 1 or 2 and a smaller padding"
    if min(x.shape[2:]) + 2 * padding < side:
        return "the image is smaller than the kernel"
    if 0 in (*x.shape, *weight.shape):
        return "there is nothing to convolve"
    return None


def slower(arguments: Conv2dArguments) -> str | None:
    """Reason PyTorch's own op is as fast, or None, by benchmarks/test_ops.py.

    With one thread the gradient of the weight alone is 1.6 to 2 times as fast on maps of 32 x 32 and 16 x 16,
    3 to 7 times on smaller ones, 1.5 to 1.7 times for kernels of 1 x 1, and no faster for images of 3
    channels.
    """
    weight = arguments.weight
    if not torch.is_grad_enabled() or not weight.requires_grad:
        return "without a gradient of the weight it is PyTorch's own op"
    if min(weight.shape[:2]) < 16:
        return f"{min(weight.shape[:2])} channels fill less than half of a tile"
    return None


def conv2d(arguments: Conv2dArguments) -> Tensor:
    x, weight, bias, stride, padding = arguments
    return _Conv2d.apply(_channels_last(x), weight, bias, stride, padding)


def _channels_last(t: Tensor) -> Tensor:
    return t.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)


class _Conv2d(torch.autograd.Function):
    """x: bfloat16, channels_last. The convolution multiplies the weight rounded to bfloat16."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int
    ) -> Tensor:
        rounded = _channels_last(weight)
        ctx.save_for_backward(x, weight, bias, rounded)
        ctx.geometry = stride, padding
        bias = None if bias is None else bias.to(torch.bfloat16)
        return F.conv2d(x, rounded, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return *_Gradient.apply(*grads, *ctx.saved_tensors, *ctx.geometry, ctx.needs_input_grad), None, None


class _Gradient(torch.autograd.Function):
    """The gradients of a convolution's inputs, in the dtypes of these; not differentiable again."""

    @staticmethod
    def forward(
        ctx: Any,
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rounded: Tensor,
        stride: int,
        padding: int,
        wanted: tuple[bool, ...],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        grad, d_x, d_weight, d_bias = _channels_last(grad), None, None, None
        if wanted[0]:
            options = None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [True, False, False]
            d_x = torch.ops.aten.convolution_backward(grad, x, rounded, *options)[0]
        if wanted[1] or wanted[2]:
            d_weight, d_bias = convolution_weight_gradient(grad, x, weight.shape[-1], stride, padding)
            d_weight = d_weight.permute(0, 3, 1, 2).to(weight.dtype)
            d_bias = None if bias is None else d_bias.to(bias.dtype)
        return d_x, d_weight, d_bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError("the gradient of conv2d cannot be differentiated again")
