"""Denoiser: the network that samples.

`make_denoiser` builds the fastest one for a UNet.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.blocks import takes_backend
from ..models.structure import altered, config_of, missing
from ..models.unet import UNet
from ..planner.graph import channels_last_strides
from ..utils.device import DTYPES, float32_products
from ..utils.memory import free_memory
from .buffers import BufferSpec, SamplerBuffers
from .cpu_plan import PlannedUNet, unsupported
from .folded_unet import FoldedUNet, unfoldable

Forward = Callable[..., Tensor]

MAX_IDLE_SHARE = 1 / 16  # of the free memory, for the feature maps of a network that is not the last one used


@dataclass(frozen=True)
class SplitUNet:
    """A UNet in two parts: `denoise(x, embed(timesteps, labels))`, as `UNet.embed` and `UNet.denoise`.

    A sampler calls `embed` for many steps at once, and captures `denoise` in CUDA graphs or recorded calls.

    embedding_size: E, where `embed` returns [B, E].
    recordable: whether `denoise` of these arguments consists of calls that can be recorded.
    release: frees the feature maps that this thread keeps between calls. buffer_bytes: their size.
    """

    embed: Callable[[Tensor, Tensor | None], Tensor]
    denoise: Callable[[Tensor, Tensor], Tensor]
    embedding_size: int
    recordable: Callable[[Tensor, Tensor], bool] = lambda x, embedding: False
    release: Callable[[], None] = lambda: None
    buffer_bytes: Callable[[], int] = lambda: 0

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        return self.denoise(x, self.embed(timesteps, labels))


@dataclass(frozen=True)
class Denoiser:
    """The network that samples: a UNet in eval mode, on one device and in one dtype.

    unet: called with x [B, C, H, W] in `dtype`, timesteps [B], and labels int64 [B] or None, as UNet.forward.
        If it is not a SplitUNet, it is called as a whole in each step.
    null_label: the label that stands for no label, or None.
    backend: of the kernels of the reverse step.
    self_condition: `unet` takes a fourth argument, the x_0 that was predicted in the step before.
    """

    unet: SplitUNet | Forward
    null_label: int | None
    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    self_condition: bool = False
    _thread_local: threading.local = field(default_factory=threading.local)  # the buffers of each thread

    def __call__(self, x: Tensor, timesteps: Tensor, labels: Tensor | None) -> Tensor:
        """As UNet.forward."""
        return self.unet(x, timesteps, labels)

    def release_if_large(self) -> None:
        """Frees the buffers of this thread from its last batch, if they are large for an idle network."""
        if isinstance(self.unet, SplitUNet) and self.unet.buffer_bytes():
            free = free_memory(self.device)
            if free is not None and self.unet.buffer_bytes() > MAX_IDLE_SHARE * free:
                self._thread_local.cached = None  # its captured steps keep the feature maps, too
                self.unet.release()

    @contextmanager
    def buffers(self, spec: BufferSpec) -> Iterator[SamplerBuffers]:
        """Buffers for a batch: those of the thread's last batch, if their sizes fit, with its captured steps.

        Calls of the same thread within the context, such as those of a callback, get other buffers; so do
        calls on another CUDA stream, which do not wait for the steps of the last one.
        """
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        cached: tuple[tuple, SamplerBuffers] | None = getattr(self._thread_local, "cached", None)
        self._thread_local.cached = None
        if cached is None or cached[0] != (spec, stream):
            cached = None  # frees the memory first
            embedding_size = self.unet.embedding_size if isinstance(self.unet, SplitUNet) else 0
            with torch.inference_mode(False):
                buffers = SamplerBuffers(spec, embedding_size, self.device, self.dtype)
                cached = (spec, stream), buffers
        try:
            yield cached[1]
        finally:
            self._thread_local.cached = cached


def make_denoiser(
    unet: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    tf32: bool = False,
    is_altered: bool | None = None,
) -> Denoiser:
    """The Denoiser of a UNet: planned for the CPU (`cpu_plan`), folded for a GPU (`folded_unet`), or modules.

    tf32: a CUDA device multiplies float32 as TF32, which is faster; else as float32. is_altered: whether the
    UNet is altered (`models.structure.altered`), for a caller that knows it.

    An altered UNet is called as a whole in each step. It keeps its own dtype,
    and autocast narrows it where `dtype` is narrower, so that user code sees the original weights.
    ValueError: a module that is None, or a backend that cannot be passed on.
    """
    if is_altered is None:
        is_altered = altered(unet) is not None
    made = (_altered_denoiser if is_altered else _own_denoiser)(unet, device, dtype, backend)
    return _multiplying(made, tf32) if (device.type, made.dtype) == ("cuda", torch.float32) else made


def _multiplying(denoiser: Denoiser, tf32: bool) -> Denoiser:
    """The denoiser of a CUDA device with its products of float32 as `float32_products` says."""

    def within(function: Forward) -> Forward:
        @functools.wraps(function)
        def run(*args: Any) -> Tensor:
            with float32_products(denoiser.device, tf32):
                return function(*args)

        return run

    unet = denoiser.unet
    if isinstance(unet, SplitUNet):
        return replace(denoiser, unet=replace(unet, embed=within(unet.embed), denoise=within(unet.denoise)))
    return replace(denoiser, unet=within(unet))


def _own_denoiser(unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str) -> Denoiser:
    """The Denoiser of an unaltered UNet."""
    assert isinstance(unet, UNet)
    size, null_label = sum(unet.embedding_sizes), unet.config.null_label
    fused = _not_fused(unet, device, dtype, backend) is None
    if fused and device.type == "cuda":
        folded = FoldedUNet(_with_weights_in_channels_last(copy.deepcopy(unet).to(device, dtype).eval()))
        split = SplitUNet(folded.embed, folded.denoise, size)
        return Denoiser(split, null_label, device, dtype, backend)
    if fused:
        planned = PlannedUNet(unet, dtype)
        held = planned.release, planned.buffer_bytes
        split = SplitUNet(unet.embed, planned.denoise, size, planned.recordable, *held)
        return Denoiser(split, null_label, device, dtype, backend)
    if _training(unet) or any((p.device, p.dtype) != (device, dtype) for p in unet.parameters()):
        unet = copy.deepcopy(unet).to(device, dtype).eval()
    if device.type == "cuda":
        unet = _with_weights_in_channels_last(unet)
    split = SplitUNet(unet.embed, functools.partial(unet.denoise, backend=backend), size)
    parameter = next(unet.parameters())
    return Denoiser(split, null_label, parameter.device, parameter.dtype, backend)


def with_vectors(denoiser: Denoiser, vectors: Tensor) -> Denoiser:
    """The denoiser of a network whose labels are vectors, for labels that are numbers of rows of `vectors`.

    vectors: float [K, E], on any device.
    """
    unet, vectors = denoiser.unet, vectors.to(denoiser.device)

    def rows(labels: Tensor | None) -> Tensor | None:
        return None if labels is None else vectors[labels]

    if isinstance(unet, SplitUNet):
        return replace(denoiser, unet=replace(unet, embed=lambda t, labels: unet.embed(t, rows(labels))))
    return replace(denoiser, unet=lambda x, t, labels, *more: unet(x, t, rows(labels), *more))


def explain(unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str) -> str:
    """How a UNet samples, "fused" or "modules", and the reasons against a faster way, a line each."""
    reason = altered(unet)
    if reason is None:
        reason = _not_fused(unet, device, dtype, backend)
        return "unet: fused" if reason is None else f"unet: modules\n  not fused: {reason}"
    lines = ["unet: modules, called whole", f"  not fused: {reason}"]
    if device.type == "cuda":
        lines.append("  not captured in a CUDA graph: a replay would pass over what was altered")
    return "\n".join(lines)


def _not_fused(unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str) -> str | None:
    """The reason why an unaltered UNet runs as its modules; None if it is planned, or folded on a GPU."""
    if backend not in ("auto", "cuda" if device.type == "cuda" else "cpp"):
        return f"the backend is {backend!r}"
    if device.type == "cuda":
        return unfoldable(unet, dtype)
    if device.type != "cpu":
        return f"it runs on {device}"
    return unsupported(unet, dtype)


def own_dtype(unet: nn.Module) -> torch.dtype:
    """The dtype in which a UNet samples unless another is chosen: its own, or the widest of several.

    For an altered UNet with several dtypes, that of its first parameter, because its code may need several.
    ValueError: a dtype in which no UNet can sample.
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
    """An error's text that names the several dtypes of the parameters, and a remedy; None for one dtype."""
    names: dict[torch.dtype, str] = {}
    for name, parameter in unet.named_parameters():
        names.setdefault(parameter.dtype, name)
    if len(names) == 1:
        return None
    kinds = ", ".join(f"{str(dtype)[6:]} ({name})" for dtype, name in names.items())
    return f"this UNet cannot be sampled in several dtypes: {kinds}; model.float() makes them one"


def _with_weights_in_channels_last(unet: UNet) -> UNet:
    """The UNet, or a copy, with weights in the order that cuDNN reads; it copies others in each call."""

    def fits(weight: Tensor) -> bool:
        return weight.ndim != 4 or weight.stride() == channels_last_strides(weight.shape)

    if all(map(fits, unet.parameters())):
        return unet
    unet = copy.deepcopy(unet)
    for module in unet.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not fits(weight):
                # Not contiguous(), which leaves the strides of a single channel as they are.
                strides = channels_last_strides(weight.shape)
                copied = torch.empty_strided(weight.shape, strides, dtype=weight.dtype, device=weight.device)
                setattr(module, name, nn.Parameter(copied.copy_(weight.detach()), weight.requires_grad))
    return unet


def _training(unet: nn.Module) -> bool:
    return any(module.training for module in unet.modules())


def _altered_denoiser(unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str) -> Denoiser:
    lost = missing(unet)
    if lost is not None:
        raise ValueError(f"unet.{lost} is None; nn.Identity() in its place would pass its input on")
    if backend != "auto" and not takes_backend(unet):
        raise ValueError(f"backend {backend!r} cannot be chosen: the UNet's `forward` takes no backend")
    own = next(unet.parameters())
    narrowed = own.device == device and own.dtype == torch.float32 and dtype.itemsize == 2
    kept = own.dtype if narrowed else dtype
    if (own.device, own.dtype) != (device, kept) or _training(unet):
        unet = _copy_with_hooks(unet).to(device, kept).eval()
    options: dict[str, Any] = {} if backend == "auto" else {"backend": backend}

    def forward(x: Tensor, timesteps: Tensor, labels: Tensor | None, x0_prev: Tensor | None = None) -> Tensor:
        further = options if x0_prev is None else options | {"x0_prev": x0_prev}
        with torch.autocast(device.type, dtype if narrowed else None, enabled=narrowed):
            return unet(x, timesteps, labels, **further)

    config = config_of(unet)
    return Denoiser(forward, config.null_label, device, kept, backend, config.self_condition)


def _copy_with_hooks(unet: nn.Module) -> nn.Module:
    """A deep copy that shares the hooks, so that a hook that collects values collects the copy's, too."""
    hooks = [
        hook
        for module in unet.modules()
        for registered in (module._forward_hooks, module._forward_pre_hooks)
        for hook in registered.values()
    ]
    return copy.deepcopy(unet, {id(hook): hook for hook in hooks})
