"""DenoiserCache: the last denoisers of a UNet, until it changes."""

from collections.abc import Callable

import torch
from torch import nn

from ..kernels import _native
from ..models.structure import Snapshot, altered
from ..models.unet import UNet
from ..utils.memory import free_memory
from .denoiser import Denoiser, make_denoiser

MAX_DENOISERS = 2  # those of "exact" and "fast"
# Free memory that another network needs, in sizes of its float32 weights; packed, they take 1 to 4.
PACKED_SIZE = 8


class DenoiserCache:
    """The last Denoisers of a UNet, one for each dtype, device and backend, unless the UNet was altered.

    A copy of the cache begins empty.
    """

    def __init__(self) -> None:
        self._kept: tuple[Snapshot, dict[tuple, Denoiser]] | None = None  # the last one last

    def __deepcopy__(self, memo: dict) -> "DenoiserCache":
        return DenoiserCache()

    def __reduce__(self) -> tuple[Callable, tuple]:
        return DenoiserCache, ()

    def get(
        self, unet: nn.Module, device: torch.device, dtype: torch.dtype, backend: str, tf32: bool = False
    ) -> Denoiser:
        """`make_denoiser`, called again only where a weight or the structure of the UNet has changed.

        A Denoiser with other options is dropped where more than MAX_DENOISERS would be kept, or where the
        device is short of memory.
        """
        key = (device, dtype, backend, tf32 and device.type == "cuda", _native.simd_in_use())
        with torch.inference_mode(False), torch.no_grad():  # later calls may be in any mode
            kept = self._kept
            if kept is not None and not kept[0].holds(unet):
                kept = self._kept = None  # frees the memory first
            if kept is not None and key in kept[1]:
                snapshot, denoisers = kept
                found = denoisers[key]
                for other in denoisers.values():
                    if other is not found:
                        other.release_if_large()
                self._kept = snapshot, {k: d for k, d in denoisers.items() if k != key} | {key: found}
                return found
            is_altered = altered(unet) is not None
            if is_altered or not isinstance(unet, UNet):
                self._kept = None
                return make_denoiser(unet, device, dtype, backend, tf32, is_altered)
            # The snapshot comes before the copy of the weights, as another thread may change the UNet.
            snapshot = Snapshot(unet) if kept is None else kept[0]
            others = {} if kept is None else dict(list(kept[1].items())[1 - MAX_DENOISERS :])
            for other in others.values():
                other.release_if_large()
            if others and _is_short_of_memory(unet, device):
                others = {}
            kept = self._kept = snapshot, others  # frees the memory of those that are dropped
            denoiser = make_denoiser(unet, device, dtype, backend, tf32, is_altered)
            self._kept = snapshot, others | {key: denoiser}
            return denoiser


def _is_short_of_memory(unet: nn.Module, device: torch.device) -> bool:
    """Whether the device may not hold another copy of the weights, packed, without the memory of others."""
    free, size = free_memory(device), 4 * sum(parameter.numel() for parameter in unet.parameters())
    return free is not None and free < PACKED_SIZE * size
