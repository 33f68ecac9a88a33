"""Results without data of the functions that networks call most often.

PyTorch derives the result of a function on tensors without data from decompositions in Python, which is most
of the time of a trace. The results here have the same shape, dtype and layout.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor


def empty_result(function: Callable, args: tuple, options: Mapping[str, Any]) -> Tensor | None:
    """The result of a call on tensors without data, or None where PyTorch must derive it."""
    derive = _SHAPES.get(function)
    if derive is None or not args or (type(args[0]) is not FakeTensor and not _is_meta(args[0])):
        return None
    x, *others = args
    tensors = [value for value in (*others, *options.values()) if isinstance(value, Tensor)]
    if not _is_plain(x) or not all(_is_plain(t) and _alike(t, x) for t in tensors):
        return None
    try:
        shape = derive(*args, **options)
    except TypeError:  # arguments that are not the function's
        return None
    return None if shape is None else x.new_empty(shape)


def _is_meta(value: Any) -> bool:
    return type(value) is Tensor and value.is_meta


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, FakeTensor) and tensor.is_contiguous()


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[int, ...] | None:
    square = all(
        type(value) is int or (type(value) is tuple and len(value) == 2) for value in (stride, padding)
    )
    if input.ndim != 4 or weight.ndim != 4 or not square or dilation not in (1, (1, 1)) or groups != 1:
        return None
    fits = input.shape[1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    sizes = []
    for i, (size, kernel) in enumerate(zip(input.shape[2:], weight.shape[2:], strict=True)):
        step, pad = (value if type(value) is int else value[i] for value in (stride, padding))
        if step < 1 or pad < 0 or size + 2 * pad < kernel:
            return None
        sizes.append((size + 2 * pad - kernel) // step + 1)
    return (input.shape[0], weight.shape[0], *sizes) if fits and input.numel() else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[int, ...] | None:
    fits = weight.ndim == 2 and input.ndim > 1 and input.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    return (*input.shape[:-1], weight.shape[0]) if fits else None


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> tuple[int, ...] | None:
    if type(num_groups) is not int or input.ndim < 2 or num_groups < 1 or input.numel() <= num_groups:
        return None
    channels = input.shape[1:2]
    fits = channels[0] % num_groups == 0 and all(v is None or v.shape == channels for v in (weight, bias))
    return tuple(input.shape) if fits else None


_SHAPES: dict[Callable, Callable[..., tuple[int, ...] | None]] = {
    torch.conv2d: _conv2d,
    F.linear: _linear,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
}
