"""A convolution for training: PyTorch's own, or a faster one of csrc/convolution/ where there is one."""

from types import ModuleType

import torch

from ... import _native
from ..._dispatch import Backend, Op, always
from . import reference, weight_gradient, winograd
from .arguments import Conv2dArguments, validate_conv2d


def _way(arguments: Conv2dArguments) -> ModuleType:
    """Winograd's algorithm where all is float32, AMX elsewhere."""
    float32 = all(t.dtype == torch.float32 for t in arguments[:3] if t is not None)
    return winograd if float32 and not torch.is_autocast_enabled("cpu") else weight_gradient


def _supports(arguments: Conv2dArguments) -> str | None:
    x, weight = arguments[:2]
    if x.device.type != "cpu" or weight.device.type != "cpu":
        return f"it runs on the CPU, not on {x.device}"
    return _native.CPP_MISSING or _way(arguments).supports(arguments)


def _slower(arguments: Conv2dArguments) -> str | None:
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return "a traced or exported network is made of PyTorch's own ops"
    return _way(arguments).slower(arguments)


def _run(arguments: Conv2dArguments) -> torch.Tensor:
    """In PyTorch's layout: channels_last if x or weight is stored so, else contiguous."""
    out = _way(arguments).conv2d(arguments)
    stored_so = any(t.stride(1) == 1 and not t.is_contiguous() for t in arguments[:2])
    return out if stored_so else out.contiguous()


op = Op(
    "conv2d",
    {
        "cpp": Backend(
            _run,
            _supports,
            slower=_slower,
            manner=lambda arguments: _way(arguments).MANNER,
        ),
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
    Returns [N, K, H', W'] in x's dtype, or autocast's, and in the layout of PyTorch's. The C++ backend in
    float32 is Winograd's algorithm (Lavin & Gray 2016, arXiv:1509.09308), for kernels of 3 x 3 with stride
    and padding 1. The errors of its output and gradients are near 1e-5 of the largest number of each, and
    2e-5 with 512 or more channels. A gradient of the weight beyond 1e33 may overflow to infinity or NaN. In
    bfloat16, on processors with AMX, it sums the gradients of weight and bias in float32 and returns them in
    the dtypes of weight and bias. A non-finite input makes every gradient that depends on it non-finite,
    perhaps more. A network that torch.jit traces or torch.export exports has PyTorch's own op. ValueError:
    shapes that do not fit, or a backend that cannot serve the call. TypeError: an argument of another type.
    Forward-mode derivatives and torch.func are the reference's.
    """
    return op(Conv2dArguments(x, weight, bias, stride, padding), backend)
