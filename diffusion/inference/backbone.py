"""Chooses the fastest network for sampling a UNet, says why, and keeps it until the UNet changes."""

import copy
import functools
from collections.abc import Callable

import torch
from torch import nn

from ..kernels import _native
from ..models.blocks import takes_backend
from ..models.structure import Snapshot, altered, missing
from ..utils.device import DTYPES
from .buffers import Network
from .cpu_plan import PreparedUNet, unfused


def make_network(unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str) -> Network:
    """The UNet in eval mode on a device and in a dtype: fused where that is possible, else its modules.

    A network that is not what its configuration says, `altered`, is called whole at every step. It keeps its
    own dtype, and autocast takes it to a narrower one, so that the code of others gets the weights it knows.
    ValueError: a module that is None, or a backend that cannot be passed on.
    """
    if altered(unet) is not None:
        return _altered_network(unet, device, dtype, backend)
    if _unfused(unet, device, dtype, backend) is None:
        denoise = PreparedUNet(unet, dtype).denoise
        size, null = sum(unet.embedding_sizes), unet.config.null_label
        return Network(unet.embed, denoise, size, null, device, dtype, backend)
    if _training(unet) or any((p.device, p.dtype) != (device, dtype) for p in unet.parameters()):
        unet = copy.deepcopy(unet).to(device, dtype).eval()
    return Network.of(unet, backend)


def explain(unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str) -> str:
    """What runs for a UNet, "fused" or "modules", and why nothing faster does, a line for each reason."""
    reason = altered(unet)
    if reason is None:
        unfused = _unfused(unet, device, dtype, backend)
        return "unet: fused" if unfused is None else f"unet: modules\n  not fused: {unfused}"
    lines = ["unet: modules, called whole", f"  not fused: {reason}"]
    if device.type == "cuda":
        lines.append("  not captured in a CUDA graph: a replay would pass over what was altered")
    return "\n".join(lines)


def _unfused(unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str) -> str | None:
    """Why an unaltered UNet is not fused, or None."""
    if backend not in ("auto", "cpp"):
        return f"the backend is {backend!r}"
    if device.type != "cpu":
        return f"it runs on {device}, not on the CPU"
    return unfused(unet, dtype)


def own_dtype(unet: nn.Module) -> torch.dtype:
    """The dtype in which a UNet samples unless another is chosen: its own, or the widest of several.

    That of the first parameter where the network was altered, whose code may know of several. ValueError: a
    dtype of which no network can be.
    """
    found = {parameter.dtype for parameter in unet.parameters()}
    if len(found) > 1 and altered(unet) is not None:
        found = {next(unet.parameters()).dtype}
    unknown = sorted(map(str, found - set(DTYPES.values())))
    if unknown:
        raise ValueError(
            f"no UNet can be sampled in its own dtype where that is {unknown[0][6:]}; "
            'choose dtype="float32", or convert the model by model.float()'
        )
    return functools.reduce(torch.promote_types, found)


def mixed_dtypes(unet: nn.Module) -> str | None:
    """That the network's parameters are of several dtypes, and the way out; None where they are of one."""
    names: dict[torch.dtype, str] = {}
    for name, parameter in unet.named_parameters():
        names.setdefault(parameter.dtype, name)
    if len(names) == 1:
        return None
    kinds = ", ".join(f"{str(dtype)[6:]} ({name})" for dtype, name in names.items())
    return f"this UNet cannot be sampled in several dtypes: {kinds}; model.float() makes them one"


def _training(unet: nn.Module) -> bool:
    return any(module.training for module in unet.modules())


def _altered_network(unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str) -> Network:
    lost = missing(unet)
    if lost is not None:
        raise ValueError(f"unet.{lost} is None; nn.Identity() in its place would pass on what it gets")
    if backend != "auto" and not takes_backend(unet):
        raise ValueError(f"backend {backend!r} cannot be chosen: the UNet's `forward` takes no backend")
    own = next(unet.parameters())
    narrowed = own.device == device and own.dtype == torch.float32 and dtype.itemsize == 2
    kept = own.dtype if narrowed else dtype
    if (own.device, own.dtype) != (device, kept) or _training(unet):
        unet = _copied(unet).to(device, kept).eval()
    options = {} if backend == "auto" else {"backend": backend}

    def forward(x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        with torch.autocast(device.type, dtype if narrowed else None, enabled=narrowed):
            return unet(x, timesteps, labels, **options)

    return Network.whole(forward, unet.config.null_label, device, kept, backend)


def _copied(unet: nn.Module) -> nn.Module:
    """A copy with the same hooks, not with copies of them."""
    hooks = [
        hook
        for module in unet.modules()
        for registered in (module._forward_hooks, module._forward_pre_hooks)
        for hook in registered.values()
    ]
    return copy.deepcopy(unet, {id(hook): hook for hook in hooks})


class NetworkCache:
    """The network of the last call, unless it was altered. A copy begins empty."""

    def __init__(self):
        self._last: tuple[tuple, Snapshot, Network] | None = None

    def __deepcopy__(self, memo) -> "NetworkCache":
        return NetworkCache()

    def __reduce__(self) -> tuple[Callable, tuple]:
        return NetworkCache, ()

    def of(self, unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str) -> Network:
        """`make_network`, made anew where the UNet is not what it was."""
        key = (device, dtype, backend, _native.simd_in_use())
        with torch.inference_mode(False), torch.no_grad():  # later calls may be in any mode
            last = self._last
            if last is not None and last[0] == key and last[1].holds(unet):
                return last[2]
            last = self._last = None  # frees the memory first
            snapshot = None if altered(unet) else Snapshot(unet)  # before, as it may change meanwhile
            network = make_network(unet, device, dtype, backend)
            if snapshot is not None:
                self._last = (key, snapshot, network)
            return network
