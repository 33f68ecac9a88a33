"""The ops: each one public function that chooses among backends which compute the same."""

import inspect
from collections.abc import Callable

from ._native import build_info
from .benchmarks import benchmark_table
from .ops import attention as _attention
from .ops import group_norm_silu as _group_norm_silu
from .ops import philox as _philox
from .ops import reverse_step as _reverse_step
from .ops.attention import attention
from .ops.convolution import differentiable as _conv2d
from .ops.convolution import fused as _conv3x3
from .ops.convolution.differentiable import conv2d
from .ops.convolution.fused import conv3x3, pack_conv3x3
from .ops.group_norm_silu import group_norm_silu
from .ops.philox import philox_normal
from .ops.reverse_step import StepCoefficients, in_place, reverse_step
from .ops.reverse_step.in_place import reverse_step_, step_counter

__all__ = [
    "StepCoefficients",
    "attention",
    "benchmark_table",
    "build_info",
    "conv2d",
    "conv3x3",
    "explain",
    "group_norm_silu",
    "pack_conv3x3",
    "philox_normal",
    "reverse_step",
    "reverse_step_",
    "step_counter",
]

_OPS = {
    function.__name__: (function, folder.op)
    for function, folder in (
        (attention, _attention),
        (conv2d, _conv2d),
        (conv3x3, _conv3x3),
        (group_norm_silu, _group_norm_silu),
        (philox_normal, _philox),
        (reverse_step, _reverse_step),
        (reverse_step_, in_place),
    )
}


def explain(op: str | Callable, *args, **kwargs) -> str:
    """Which backend an op (its name or public function) would run for these arguments, and why no other.

    The arguments are those of the public function, `backend` included. Raises ValueError where it would.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _OPS:
        raise ValueError(f"unknown op {name!r}; choose from: {', '.join(_OPS)}")
    function, implementation = _OPS[name]
    call = inspect.signature(function).bind(*args, **kwargs)
    call.apply_defaults()
    return implementation.explain(*call.args, **call.kwargs)
