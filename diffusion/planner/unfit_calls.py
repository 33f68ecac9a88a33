"""Calls of a module that are not planned, with the reasons that are known before a trace."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..kernels import _native
from ..kernels._dispatch import intercepted, transformed


def unfit_module(module: nn.Module, device: torch.device) -> str | None:
    """The reason why no call of the module can be planned now. device: of its weights."""
    if device.type not in ("cpu", "cuda"):
        return f"its weights are on {device}"
    if device.type == "cpu" and _native.CPP_MISSING:
        return _native.CPP_MISSING
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "it is being compiled"
    if module.training:
        return "it is in training mode; call eval()"
    if torch.is_autocast_enabled(device.type):
        return "autocast is enabled"
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a forward hook is registered for all modules"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active, which sees only the modules' operators"
    return intercepted() or transformed()


def unfit_inputs(module: nn.Module, leaves: list[Any], device: torch.device) -> str | None:
    """The reason why a call with these arguments cannot be planned."""
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout != torch.strided:
                return f"an input is a {type(leaf).__name__} with the layout {leaf.layout}"
            if leaf.device != device and (leaf.ndim or leaf.device.type != "cpu"):
                return f"an input is on {leaf.device}, not on {device}"
            if torch.is_grad_enabled() and leaf.requires_grad:
                return "an input requires a gradient"
        elif not isinstance(leaf, int | float | str | bool | torch.dtype | None):
            return f"an argument is a {type(leaf).__name__}"
    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        return "a gradient is wanted; call it under torch.no_grad() or torch.inference_mode()"
    return None
