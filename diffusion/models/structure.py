"""Compares a UNet with the one that its configuration builds, and with its own earlier state.

Fused code, a copy or a captured graph may replace a UNet only while both comparisons hold. A hook, a
replaced method, another module or another attribute means that the modules themselves must run.
"""

import functools
import inspect
import reprlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..kernels import _native
from ..kernels._dispatch import intercepted
from ..planner.state import ModuleState
from . import blocks
from .network import Network, NetworkConfig
from .registry import build_on_meta
from .unet import UNet

# Attributes that do not affect the output in eval mode without gradients.
_INTERNAL = {*vars(nn.Module()), "checkpointing", "dropout"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OWN = (
    UNet,
    blocks.Attention,
    blocks.Conv2d,
    blocks.Downsample,
    blocks.Level,
    blocks.Middle,
    blocks.Norm,
    blocks.ResBlock,
    blocks.Upsample,
)
_OTHERS = (nn.Conv2d, nn.Embedding, nn.Linear, nn.ModuleList, nn.Sequential, nn.SiLU)
_CALLING = ("__call__", "_call_impl", "_conv_forward", "_wrapped_call_impl", "forward")
CHUNK = 1024  # numbers of the weights in one sum of `_projections`
GROUP = 1 << 24  # numbers that it joins


def _methods() -> Iterator[tuple[type, str, Callable]]:
    """The methods that a UNet's modules run."""
    for cls in (*_OWN, *_OTHERS):
        own = [name for name, value in vars(cls).items() if inspect.isfunction(value)] if cls in _OWN else []
        for name in {*own, *_CALLING}:
            if hasattr(cls, name):
                yield cls, name, getattr(cls, name)


_METHODS = list(_methods())


def altered(unet: nn.Module) -> str | None:
    """The first difference from `UNet(unet.config)`, weights aside, as a sentence; None if there is none."""
    reason = _altered_everywhere()
    if reason is None and type(unet) is not UNet:
        reason = f"it is {_called(unet)}, not UNet of {__package__}"
    return reason or _difference("", unet, configured(config_of(unet)))


def config_of(unet: nn.Module | None) -> NetworkConfig:
    """The configuration of a network; ValueError unless it is a Network or has the `config` of one."""
    config = getattr(unet, "config", None)
    if unet is None or not isinstance(config, NetworkConfig):
        inner = getattr(getattr(unet, "module", None), "config", None)
        hint = "; its `module` is one" if isinstance(inner, NetworkConfig) else ""
        raise ValueError(
            f"model.unet must be a UNet, or a module with a UNet's `config`, not {_called(unet)}{hint}"
        )
    if next(unet.parameters(), None) is None:
        raise ValueError(f"model.unet must have parameters, and {_called(unet)} has none")
    return config


def missing(unet: nn.Module) -> str | None:
    """The name of a necessary module that was set to None; None if there is none."""
    if not isinstance(unet, UNet):
        return None
    for name, built in configured(config_of(unet)).named_modules():
        *path, last = name.split(".")
        parent: object = unet
        for key in path:
            parent = getattr(parent, key, None)
        gone = isinstance(parent, nn.Module) and getattr(parent, last, built) is None
        if gone and not _can_go(built, last):
            return name
    return None


def _can_go(module: nn.Module, name: str) -> bool:
    return isinstance(module, blocks.Attention) or name == "norm" or name == "conv"


def _altered_everywhere() -> str | None:
    """An alteration that affects all modules of the process, as a sentence, or None."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a forward hook is registered for all modules"
    if torch._C._len_torch_dispatch_stack():
        return "a TorchDispatchMode is active, which sees only the modules' operators"
    for cls, name, method in _METHODS:
        if getattr(cls, name, None) is not method:
            return f"{cls.__name__}.{name} was replaced"
    return intercepted()


@functools.lru_cache(8)
def configured(config: NetworkConfig) -> Network:
    """`build_on_meta` in float32 and eval mode: the same network each time, which must not be changed."""
    return build_on_meta(config).float().eval()


def _difference(name: str, module: nn.Module | None, built: nn.Module) -> str | None:
    """The first difference between a module, with its children, and the one built anew, as a sentence."""
    called = name or "it"
    if type(module) is not type(built):
        return f"{called} is {_called(module)}, not {_called(built)}"
    own, expected = vars(module), vars(built)
    if any(own[hooks] for hooks in _HOOKS):
        return f"{called} has a forward hook"
    prefix = f"{name}." if name else ""
    return (
        _different_attribute(prefix, own, expected, type(module))
        or _different_parameter(prefix, module, built)
        or _different_child(prefix, own["_modules"], expected["_modules"])
    )


def _called(module: nn.Module | None) -> str:
    """The module's class with its package, because torch.nn has a Conv2d, too."""
    if module is None:
        return "None"
    cls = type(module)
    if cls.__module__.startswith("torch.nn.modules."):
        return f"torch.nn.{cls.__name__}"
    package = cls.__module__.partition(".")[0]
    return f"{cls.__name__} of {cls.__module__ if package == 'torch' else package}"


def _different_attribute(prefix: str, own: dict, expected: dict, cls: type) -> str | None:
    for name in expected.keys() - _INTERNAL:
        value, right = own.get(name), expected[name]
        if type(value) is not type(right) or value != right:
            return f"{prefix}{name} is {reprlib.repr(value)}, not {reprlib.repr(right)}"
    for name in own.keys() - expected.keys() - _INTERNAL:
        if hasattr(cls, name):
            return f"{prefix}{name} was replaced"
    return None


def _different_parameter(prefix: str, module: nn.Module, built: nn.Module) -> str | None:
    for name, right in built._parameters.items():
        parameter = module._parameters.get(name)
        if right is None and parameter is None:
            continue
        if right is None or type(parameter) is not nn.Parameter or parameter.layout != torch.strided:
            return f"{prefix}{name} is {_kind(parameter)}, not {_kind(right)}"
        if parameter.shape != right.shape:
            return f"{prefix}{name} is {list(parameter.shape)}, not {list(right.shape)}"
    return None


def _kind(parameter: Tensor | None) -> str:
    if parameter is None:
        return "None"
    dense = "" if parameter.layout == torch.strided else f" ({parameter.layout})"
    return f"a {type(parameter).__name__}{dense}"


def _different_child(prefix: str, own: dict, expected: dict) -> str | None:
    if list(own) != list(expected):
        other = next(iter(own.keys() ^ expected.keys()), None)
        if other is None:
            return f"{prefix or 'its '}modules have another order"
        return f"{prefix}{other} is {'no' if other in expected else 'an additional'} module"
    for name, built in expected.items():
        if built is None and own[name] is None:
            continue
        if built is None:
            return f"{prefix}{name} is {_called(own[name])}, not None"
        reason = _difference(prefix + name, own[name], built)
        if reason is not None:
            return reason
    return None


class Snapshot:
    """The state of an unaltered UNet at one time, with its weights, for a later comparison."""

    def __init__(self, unet: nn.Module):
        self._state = ModuleState(unet)
        # The state compares numbers on the CPU, by the compiled library.
        compared = not _native.CPP_MISSING
        self._parameters = [p for p in unet.parameters() if not (compared and p.device.type == "cpu")]
        self._sums = _projections(self._parameters)

    def holds(self, unet: nn.Module) -> bool:
        """Whether the network is the same, with the same attributes, modules and weights."""
        if unet is not self._state.modules[0] or _altered_everywhere() is not None:
            return False
        if not self._state.holds(whole=True):
            return False
        return all(map(bool, map(_same_numbers, self._sums, _projections(self._parameters))))


def _same_numbers(a: Tensor, b: Tensor) -> Tensor:
    return ((a == b) & a.isfinite()).all()


def _projections(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Checksums of the weights, because writing through `.data` or in inference mode changes no version.

    Each CHUNK of numbers is multiplied with fixed random numbers and summed, so that the order counts. The
    weights are joined, up to GROUP numbers at a time, since a GPU takes as long to begin a sum as to do it.
    """
    groups: dict[tuple, list[list[Tensor]]] = {}
    for parameter in parameters:
        weight = parameter.detach()
        joined = groups.setdefault((weight.device, weight.dtype), [[]])
        if sum(map(len, joined[-1])) + weight.numel() > GROUP and joined[-1]:
            joined.append([])
        joined[-1].append(_flat(weight))
    results = []
    for (device, dtype), joined in groups.items():
        wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
        factors = torch.randn(CHUNK, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        factors, sums = factors.to(device, wide), []
        for weights in joined:
            rest = -sum(map(len, weights)) % CHUNK
            numbers = torch.cat([*weights, torch.zeros(rest, device=device, dtype=dtype)])
            sums.append(numbers.to(wide).view(-1, CHUNK).mv(factors))
        results.append(torch.cat(sums))
    return results


def _flat(weight: Tensor) -> Tensor:
    """The numbers of a weight as one vector, in memory order if that avoids a copy."""
    if weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(-1)
