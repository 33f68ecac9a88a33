"""Which implementation of an op runs, and why the others do not.

A backend is a few functions that take the op's arguments: `run` computes, and `supports` returns None where
`run` can serve these arguments, or else the reason why not, as a short sentence for the user. `slower` gives
the reason why "auto" passes over a backend that could serve, where the benchmarks favour another one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from ._native import check_environment


def always(*args, **kwargs) -> None:
    """The `supports` of a backend that serves every valid call, such as a plain PyTorch reference."""


def constant_in_graphs(function: Callable) -> Callable:
    """Has torch.compile call the function once, as torch.compiler.assume_constant_result does.

    That decorator imports the whole compiler, which takes longer than all of this package.
    """
    function._dynamo_marked_constant = True
    return function


@constant_in_graphs
def vectorised() -> bool:
    """Whether torch.vmap is active: its tensors know no memory layout but the contiguous one."""
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def transformed() -> str | None:
    """Why no compiled operator can run here: their derivatives are those of one reverse pass."""
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


def intercepted() -> str | None:
    """Why "auto" takes plain PyTorch: someone watches or changes its functions. None if nobody does.

    The mode of torch.set_default_device changes only where tensors are made.
    """
    if torch.compiler.is_compiling():
        return None
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
    run: Callable[..., Any]
    supports: Callable[..., str | None]
    slower: Callable[..., str | None] = always


class Op:
    """An op and its backends, listed in the order in which "auto" tries them.

    The last is plain PyTorch: it serves every call, is never slower, and takes part in every transform.
    `validate` raises ValueError for arguments that no backend could serve; it runs before the choice.
    """

    def __init__(self, name: str, backends: dict[str, Backend], validate: Callable[..., None] = always):
        self.name = name
        self.backends = backends
        self.validate = validate

    def _refusal(self, name: str, *args, **kwargs) -> str | None:
        reason = None if name == next(reversed(self.backends)) else transformed()
        return reason or self.backends[name].supports(*args, **kwargs)

    def serving(self, *args, **kwargs) -> list[str]:
        """Names of the backends that could serve this call, in the order of preference."""
        return [name for name in self.backends if self._refusal(name, *args, **kwargs) is None]

    def choose(self, backend: str, *args, **kwargs) -> str:
        """Name of the backend that `backend` stands for; ValueError with the reason if it cannot serve."""
        check_environment()
        self.validate(*args, **kwargs)
        if backend == "auto" and intercepted():
            return next(reversed(self.backends))
        if backend == "auto":
            serving = self.serving(*args, **kwargs)
            return next(name for name in serving if self.backends[name].slower(*args, **kwargs) is None)
        if not isinstance(backend, str) or backend not in self.backends:
            raise ValueError(
                f"{self.name} has no backend {backend!r}; choose from: auto, {', '.join(self.backends)}"
            )
        reason = self._refusal(backend, *args, **kwargs)
        if reason is not None:
            raise ValueError(f"{self.name}: backend {backend!r} cannot serve this call: {reason}")
        return backend

    def __call__(self, *args, backend: str = "auto", **kwargs):
        return self.backends[self.choose(backend, *args, **kwargs)].run(*args, **kwargs)

    def explain(self, *args, backend: str = "auto", **kwargs) -> str:
        """One line for each backend: the one that runs, and for the others why they do not."""
        chosen = self.choose(backend, *args, **kwargs)
        lines = [f"{self.name}: {chosen}"]
        for name, candidate in self.backends.items():
            if name != chosen:
                reason = self._refusal(name, *args, **kwargs) or candidate.slower(*args, **kwargs)
                reason = reason or (intercepted() if backend == "auto" else None)
                reason = reason or f"available; {chosen!r} is preferred"
                lines.append(f"  not {name}: {reason}")
        return "\n".join(lines)
