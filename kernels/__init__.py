"""The ops: each one public function that chooses among backends which compute the same."""

from collections.abc import Callable

from . import attention as _attention
from . import group_norm_silu as _group_norm_silu
from . import philox as _philox
from . import reverse_step as _reverse_step
from .attention import attention
from .group_norm_silu import group_norm_silu
from .philox import philox_normal
from .reverse_step import Row, reverse_step

__all__ = ["Row", "attention", "explain", "group_norm_silu", "philox_normal", "reverse_step"]

_OPS = {folder.op.name: folder.op for folder in (_attention, _group_norm_silu, _philox, _reverse_step)}


def explain(op: str | Callable, *args, backend: str = "auto", **kwargs) -> str:
    """Which backend the op (a name, or its public function) would run for this call, and why not the others.

    Raises ValueError where the call itself would.
    """
    name = op if isinstance(op, str) else op.__name__
    if name not in _OPS:
        raise ValueError(f"unknown op {name!r}; choose from: {', '.join(_OPS)}")
    return _OPS[name].explain(*args, backend=backend, **kwargs)
