"""Chooses the implementation of an op, and explains why the others do not run.

A backend is a few functions of the op's arguments, which are one record (`kernels/ops/<op>/arguments.py`):
`run` computes. `supports` returns None where `run` can serve these arguments, or else the reason why not, as
a short sentence for the user. `slower` gives the reason why "auto" passes over a backend that could serve,
where the benchmarks favour another one. `manner` says how `run` would serve them, where it has several ways.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from . import _native
from ._native import check_environment

MAX_REMEMBERED = 4096  # calls whose backend an op remembers; a network makes one for each shape


def always(arguments: object) -> None:
    """The `supports` of a backend that serves every valid call, such as a plain PyTorch reference."""


def constant_in_graphs(function: Callable) -> Callable:
    """Makes torch.compile call the function once, as torch.compiler.assume_constant_result does.

    PyTorch's decorator imports the whole compiler, which takes longer than all of this package.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined] # torch.compile reads it
    return function


@constant_in_graphs
def vectorised() -> bool:
    """Whether torch.vmap is active. Its tensors have no memory layout but the contiguous one."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def transformed() -> str | None:
    """Reason the compiled backends are unusable here, or None: they implement reverse mode only.

    torch.func transforms and forward-mode derivatives need plain PyTorch.
    """
    if torch.compiler.is_compiling():
        return "torch.vmap is active" if vectorised() else None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are being computed"
    return None


# The functions of PyTorch that a UNet's modules and the references call, and that people replace.
_FUNCTIONS = {
    (module, name): getattr(module, name)
    for module, names in (
        (F, ("conv2d", "interpolate", "linear", "pad", "scaled_dot_product_attention", "silu")),
        (torch, ("group_norm",)),
    )
    for name in names
}
_OWN = tuple(_FUNCTIONS.values())


def _are_own() -> bool:
    """Whether all of `_FUNCTIONS` are PyTorch's; written out, since every call of an op asks."""
    return (
        F.conv2d,
        F.interpolate,
        F.linear,
        F.pad,
        F.scaled_dot_product_attention,
        F.silu,
        torch.group_norm,
    ) == _OWN


def intercepted() -> str | None:
    """Reason "auto" takes plain PyTorch here, or None: its functions are watched or were replaced.

    The mode of torch.set_default_device does not count: it changes only where tensors are made.
    """
    if torch.compiler.is_compiling():
        return None
    if not _are_own():
        for (module, name), function in _FUNCTIONS.items():
            if getattr(module, name) is not function:
                return f"{module.__name__}.{name} was replaced"
    if torch._C._is_torch_function_mode_enabled():
        for mode in _get_current_function_mode_stack():
            if type(mode) is not DeviceContext:
                return (
                    f"{type(mode).__name__} is active, a TorchFunctionMode that sees PyTorch's functions only"
                )
    return None


class Backend(NamedTuple):
    """Functions of the op's record of arguments; see above."""

    run: Callable[[Any], Any]
    supports: Callable[[Any], str | None]
    slower: Callable[[Any], str | None] = always
    manner: Callable[[Any], str | None] = always


def _identity(arguments: Any, backend: str) -> tuple | None:
    """All that the choice for a call on a CUDA device depends on; None for calls whose choice is not kept.

    To choose takes the host longer than a GPU needs for many calls. On the CPU the choice also depends on the
    instruction set and on autocast, and a call takes longer.
    """
    if torch.compiler.is_compiling() or not isinstance(arguments, tuple):
        return None
    if not (isinstance(arguments[0], torch.Tensor) and arguments[0].is_cuda):
        return None
    if intercepted() or transformed():
        return None
    parts: list[Any] = [backend, torch.is_grad_enabled(), _native.CUDA_MISSING]
    for value in arguments:
        if isinstance(value, torch.Tensor):
            parts += (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        elif value is None or type(value) in (int, float, str):
            parts += (type(value), value)
        else:
            return None
    return tuple(parts)


class Op:
    """An op and its backends, listed in the order in which "auto" tries them.

    The last is plain PyTorch: it serves every call, is never slower, and takes part in every transform.
    `validate` raises ValueError or TypeError for arguments that no backend could serve. It runs before the
    choice. `arguments` is always the op's record of arguments.
    """

    def __init__(self, name: str, backends: dict[str, Backend], validate: Callable[[Any], None] = always):
        self.name = name
        self.backends = backends
        self.validate = validate
        self._chosen: dict[tuple, str] = {}

    def _refusal(self, name: str, arguments: Any) -> str | None:
        reason = None if name == next(reversed(self.backends)) else transformed()
        return reason or self.backends[name].supports(arguments)

    def serving(self, arguments: Any) -> list[str]:
        """Names of the backends that could serve this call, in the order of preference."""
        return [name for name in self.backends if self._refusal(name, arguments) is None]

    def choose(self, arguments: Any, backend: str = "auto") -> str:
        """Name of the backend that `backend` stands for. ValueError with the reason if it cannot serve."""
        identity = _identity(arguments, backend)
        if identity is None:
            return self._choose(arguments, backend)
        if identity not in self._chosen:
            if len(self._chosen) >= MAX_REMEMBERED:
                self._chosen = {}
            self._chosen[identity] = self._choose(arguments, backend)
        return self._chosen[identity]

    def _choose(self, arguments: Any, backend: str) -> str:
        check_environment()
        self.validate(arguments)
        if backend == "auto" and intercepted():
            return next(reversed(self.backends))
        if backend == "auto":
            serving = self.serving(arguments)
            return next(name for name in serving if self.backends[name].slower(arguments) is None)
        if not isinstance(backend, str) or backend not in self.backends:
            raise ValueError(
                f"{self.name} has no backend {backend!r}; choose from: auto, {', '.join(self.backends)}"
            )
        reason = self._refusal(backend, arguments)
        if reason is not None:
            raise ValueError(f"{self.name}: backend {backend!r} cannot serve this call: {reason}")
        return backend

    def __call__(self, arguments: Any, backend: str = "auto") -> Any:
        return self.backends[self.choose(arguments, backend)].run(arguments)

    def explain(self, arguments: Any, backend: str = "auto") -> str:
        """One line for each backend: the one that runs, and the reason for each of the others."""
        chosen = self.choose(arguments, backend)
        manner = self.backends[chosen].manner(arguments)
        lines = [f"{self.name}: {chosen}" + (f", {manner}" if manner else "")]
        for name, candidate in self.backends.items():
            if name != chosen:
                reason = self._refusal(name, arguments) or candidate.slower(arguments)
                reason = reason or (intercepted() if backend == "auto" else None)
                reason = reason or f"available; {chosen!r} is preferred"
                lines.append(f"  not {name}: {reason}")
        return "\n".join(lines)
