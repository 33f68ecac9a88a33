"""conv2d of float32 and its gradients by Winograd's algorithm: csrc/convolution/winograd_training.cpp."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _native
from .arguments import Conv2dArguments
from .library import convolution_, pack_winograd, winograd_weight_gradient
from .packing import panel_of

TILE = 4  # F(4 x 4, 3 x 3)
ACCURACY = 2e-5  # of output and gradients, relative to the largest; see `_tolerance.wrong`
MIN_TILES = 32  # of a batch
MIN_PIXELS = 9  # of a tile on average, of 16
MIN_CHANNELS = 32
MIN_CONVOLVED = 64  # channels of an image, without which PyTorch's convolution of it is as fast
MANNER = "by Winograd's algorithm"


def supports(arguments: Conv2dArguments) -> str | None:
    x, weight, _, stride, padding = arguments
    if weight.shape[2:] != (3, 3) or (stride, padding) != (1, 1):
        return "Winograd's algorithm is for kernels of 3 x 3 with a stride and padding of 1"
    if 0 in (*x.shape, *weight.shape):
        return "there is nothing to convolve"
    return None


def slower(arguments: Conv2dArguments) -> str | None:
    """Reason PyTorch's own op is as fast or to be preferred, or None, by benchmarks/test_ops.py.

    With one thread and AVX2, output and gradients together take 0.45 to 0.65 of PyTorch's time, the gradient
    of the weight alone a quarter to a half.
    """
    x, weight, bias = arguments[:3]
    if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return "without a gradient it is PyTorch's own op, which rounds less"
    if _native.simd_in_use() == "baseline":
        return "this processor has no AVX2"
    channels, (height, width) = min(weight.shape[:2]), x.shape[2:]
    if channels < MIN_CHANNELS:
        return f"the transforms of {channels} channels take as long as they save"
    tiles = -(-height // TILE) * -(-width // TILE)
    if height * width < MIN_PIXELS * tiles:
        return f"{height} x {width} pixels fill less than {MIN_PIXELS}/16 of their tiles"
    if len(x) * tiles < MIN_TILES:
        return f"the transform of the weight takes as long as {len(x) * tiles} tiles save"
    return None


def conv2d(arguments: Conv2dArguments) -> Tensor:
    x, weight, bias, _, _ = arguments
    return _Conv2d.apply(_channels_last(x), weight, bias)


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """The convolution of x, or, if transposed, the gradient of its input from x, that of its output."""
    shape = len(x), weight.shape[1 if transposed else 0], *x.shape[2:]
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    panel = panel_of(_native.simd_in_use())
    packed = pack_winograd(weight, transposed, panel)
    convolution_(x, packed, 3, 1, 1, 1, TILE, 0, bias, None, False, None, out, panel=panel)
    return out


class _Conv2d(torch.autograd.Function):
    """x: channels_last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        if x.shape[1] < MIN_CONVOLVED:
            return F.conv2d(x, weight, bias, padding=1)
        return _convolve(x, weight, None if bias is None else bias.contiguous())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x, of_weight, of_bias = wanted = ctx.needs_input_grad
        # Compiled steps have neither a second derivative (create_graph) nor a batch of gradients.
        if not torch.compiler.is_compiling() and (torch.is_grad_enabled() or _batched(grad)):
            return _gradients_of_torch(grad, x, weight, ctx.bias_sizes, wanted)
        grad, d_x, d_weight, d_bias = _channels_last(grad), None, None, None
        if of_x and weight.shape[0] < MIN_CONVOLVED:
            d_x = _gradients_of_torch(grad, x, weight, None, (True, False, False))[0]
        elif of_x:
            d_x = _convolve(grad, weight, None, transposed=True)
        if of_weight or of_bias:
            by_channels, d_bias = winograd_weight_gradient(grad, x)
            d_weight = by_channels.permute(0, 3, 1, 2)
        return d_x, d_weight if of_weight else None, d_bias if of_bias else None


def _batched(grad: Tensor) -> bool:
    """Whether it stands for several gradients, as in torch.autograd.grad(..., is_grads_batched=True)."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)


def _gradients_of_torch(
    grad: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    options = bias_sizes, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, list(wanted)
    return torch.ops.aten.convolution_backward(grad, x, weight, *options)
