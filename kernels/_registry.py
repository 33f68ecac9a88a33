"""Finds the ops: one folder each, with its public names, functions and cases.

`kernels/ops/<op>/__init__.py` has `__all__`, the public names, and `OPS`, the public functions that choose
among backends. `INTERNAL`, if it is there, names the operators that only the package calls.
`kernels/ops/<op>/peers.py` has `SUBJECTS`, the functions' cases and PyTorch's ops for comparison.
"""

import functools
import pkgutil
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch

from . import _native
from ._dispatch import Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PublicOp(NamedTuple):
    """function: the public function; its keyword `backend` names a backend of `op`.

    arguments: makes the record that `op` takes from the function's arguments, without `backend`. example: the
    record of a small call on a device, for `diffusion info`.
    """

    function: Callable[..., Any]
    op: Op
    arguments: Callable[..., Any]
    example: Callable[[str], Any]


def _missing() -> str | None:
    return _native.CPP_MISSING


class InternalOp(NamedTuple):
    """An operator that only the package calls, and only where it can run; it has no other backend.

    caller: what calls it. missing: the reason why it cannot run here, or None. backend: "cpp" or "cuda".
    """

    name: str
    caller: str = "planned networks"
    missing: Callable[[], str | None] = _missing
    backend: str = "cpp"

    def explain(self) -> str:
        """One line if it runs here, or two with the reason why it does not; as `kernels.explain`."""
        reason = self.missing()
        if reason is None:
            return f"{self.name}: {self.backend}, called by {self.caller}"
        return f"{self.name}: not called by {self.caller}\n  not {self.backend}: {reason}"


class Subject(NamedTuple):
    """The inputs with which a public op is tested and timed.

    cases: named inputs. benchmarked: the names of those that a real model has; default: all.
    inputs: the arguments of a call, positional and by keyword, from case, dtype, device and seed.
    torch_ops: the same computation in PyTorch's own ops, from the case and the arguments of a call.
    differentiable: forward together with backward is timed too. in_place: the op returns None and has
    overwritten its arguments. in_graph: a CUDA graph can hold a call: it copies nothing from the host.
    accuracy: the documented extra error of the op, from its positional arguments; see `_tolerance.wrong`.
    """

    cases: dict[str, Any]
    torch_ops: Callable[..., Any]
    benchmarked: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = DTYPES
    inputs: Callable[..., tuple[tuple, dict]] = lambda case, *where: case.inputs(*where)
    differentiable: bool = False
    in_place: bool = False
    in_graph: bool = True
    accuracy: Callable[[tuple], float] = lambda args: 0.0


def folders(package: ModuleType) -> list[ModuleType]:
    """The folders of a package, imported, in the order of their names."""
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__) if info.ispkg)
    return [import_module(f"{package.__name__}.{name}") for name in names]


@functools.cache
def discover(package: ModuleType) -> dict[str, PublicOp]:
    """Every op of the folders of a package, by the name of its public function."""
    return {op.function.__name__: op for folder in folders(package) for op in folder.OPS}


def internal_ops(package: ModuleType) -> list[InternalOp]:
    """The internal operators of the folders of a package."""
    return [op for folder in folders(package) for op in getattr(folder, "INTERNAL", ())]


@functools.cache
def subjects(package: ModuleType) -> dict[str, Subject]:
    """The cases and peers of every op of a package, by the name of its public function."""
    found: dict[str, Subject] = {}
    for folder in folders(package):
        if folder.OPS:
            found |= import_module(f"{folder.__name__}.peers").SUBJECTS
    return found
