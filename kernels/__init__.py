"""The ops. Each is a public function with several backends for the same computation.

An op is a folder of `ops/`, registered by being there. The imports below repeat the public names of the
folders, so that editors and type checkers follow them.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import ops
from ._native import build_info as build_info
from ._registry import discover, folders, internal_ops
from .ops.attention import attention as attention
from .ops.convolution import conv2d as conv2d
from .ops.convolution import conv3x3 as conv3x3
from .ops.convolution import pack_conv3x3 as pack_conv3x3
from .ops.group_norm_silu import group_norm_silu as group_norm_silu
from .ops.philox import philox_normal as philox_normal
from .ops.reverse_step import StepCoefficients as StepCoefficients
from .ops.reverse_step import reverse_step as reverse_step
from .ops.reverse_step import reverse_step_ as reverse_step_
from .ops.reverse_step import step_counter as step_counter

if TYPE_CHECKING:
    from .benchmarks import benchmark_table as benchmark_table

OPS = discover(ops)
INTERNAL = internal_ops(ops)

__all__ = ["benchmark_table", "build_info", "explain"]
__all__ += [name for folder in folders(ops) for name in folder.__all__]


def __getattr__(name: str) -> Any:
    if name == "benchmark_table":  # imported here, because few users measure
        from .benchmarks import benchmark_table

        return benchmark_table
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def explain(op: str | Callable, *args: Any, **kwargs: Any) -> str:
    """One line for each backend of an op: the backend that would run, and the reason against each other one.

    op: the name of a public function, or the function. The other arguments are that function's, `backend`
    included. ValueError where the function would raise it, or for an unknown op.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise ValueError(f"unknown op {name!r}; choose from: {', '.join(OPS)}")
    public = OPS[name]
    call = inspect.signature(public.function).bind(*args, **kwargs)
    call.apply_defaults()
    backend = call.arguments.pop("backend")
    return public.op.explain(public.arguments(**call.arguments), backend)
