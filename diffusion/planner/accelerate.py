"""accelerate: any network of PyTorch, planned at its first call with inputs of a shape."""

import copyreg
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from .accelerated_forward import AcceleratedForward
from .release import ReleasedWeights

M = TypeVar("M", bound=nn.Module)

PRECISIONS = ("exact", "fast")


def check_precision(precision: str) -> None:
    """ValueError: an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")


def accelerate(module: M, *, precision: str = "exact", release_weights: bool = False) -> M:
    """Plans a network, so that the compiled ops compute it; returns the same module.

    From now on a call in eval mode and without gradients runs a plan, which the first call with inputs of
    these shapes makes: convolutions with the normalisations, activations and residuals around them, linear
    maps and attention. The rest stays calls of PyTorch. The module keeps its class, signature, `state_dict`
    and results. A call that cannot be planned runs the module as before; `module.report()` tells the reason.
    Weights that change in place or are replaced are noticed. Of numbers that are written through `.data`,
    whole weights are noticed by the next call, and a few numbers by one of the next 256.

    On a GPU the plan calls this package's kernels for group normalisations with their SiLU, and for
    attention, and PyTorch for all else. It can be captured as a CUDA graph after a first call. Under
    `torch.compile` the module is compiled as it came.

    module: any module in eval mode, such as the `unet` of a pipeline of diffusers.
    precision: "exact" computes in the dtype of the weights, and differs from PyTorch by rounding; "fast"
        computes the feature maps of float32 modules in bfloat16, on processors that multiply it (AVX512_BF16,
        AMX), and elsewhere as "exact" does; on a GPU, as `torch.autocast` does.
    release_weights: moves the module's parameters on the CPU out of memory, into a file without a name in the
        folder of `tempfile.gettempdir()`. The plans hold packed copies, and what else reads the parameters
        reads the file. They stay there after `restore`. Numbers written through `.data` are not noticed.
    TypeError: not a module. ValueError: an unknown precision, or a module that is scripted
        or whose `forward` was replaced.
    OSError: the disk has no place for released weights.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module, not {type(module).__name__}")
    check_precision(precision)
    restore(module)
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError("accelerate cannot plan a scripted module: give it the module that it was made from")
    if "forward" in vars(module):
        raise ValueError(f"accelerate needs the forward of {type(module).__name__}, and it was replaced")
    released = ReleasedWeights(module) if release_weights else None
    _put(AcceleratedForward(module, precision, released=released), module)
    copyreg.dispatch_table.setdefault(type(module), _reduced)
    return module


def _put(forward: AcceleratedForward, module: nn.Module) -> None:
    vars(module).update(forward=forward, report=forward.report)  # of this module, not of its class


def restore(module: M) -> M:
    """Undoes `accelerate`; returns the same module."""
    if isinstance(vars(module).get("forward"), AcceleratedForward):
        del vars(module)["forward"], vars(module)["report"]
    return module


def _reduced(module: nn.Module) -> str | tuple[Any, ...]:
    """The parts for `copy` and `pickle`. A copy that is accelerated runs itself, not the original."""
    attributes = vars(module)
    forward = attributes.get("forward")
    if not isinstance(forward, AcceleratedForward):
        return module.__reduce_ex__(4)
    ours = {name: attributes.pop(name) for name in ("forward", "report")}
    try:  # a class may put its attributes anywhere in its parts
        reduced = module.__reduce_ex__(4)
        if isinstance(reduced, str):
            return reduced
        make, args, *more = ((dict(part) if part is attributes else part) for part in reduced)
        if more and isinstance(more[0], tuple):
            more[0] = tuple(dict(part) if part is attributes else part for part in more[0])
    finally:
        attributes.update(ours)
    return _accelerated_copy, (forward.precision, make, args), *more


def _accelerated_copy(precision: str, make: Callable[..., nn.Module], args: tuple) -> nn.Module:
    """A module that `copy` or `pickle` gives its state next."""
    module = make(*args)
    _put(AcceleratedForward(module, precision), module)
    return module
