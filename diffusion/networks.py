"""Which network samples for a UNet, and keeping it for as long as no weight changes."""

import copy

import torch

from .chain import Network
from .kernels import _native
from .prepared import PreparedUNet, unsupported
from .unet import UNet


def make_network(unet: UNet, device: torch.device, dtype: torch.dtype, backend: str) -> Network:
    """The UNet in eval mode on a device and in a dtype: prepared where that is possible, else a module."""
    own = next(unet.parameters())
    fused = device.type == own.device.type == "cpu" and backend in ("auto", "cpp")
    if fused and unsupported(unet, dtype) is None:
        denoise = PreparedUNet(unet, dtype).denoise
        size, null = sum(unet.embedding_sizes), unet.config.null_label
        return Network(unet.embed, denoise, size, null, device, dtype, backend)
    if (own.device, own.dtype) != (device, dtype) or unet.training:
        unet = copy.deepcopy(unet).to(device, dtype).eval()
    return Network.of(unet, backend)


class NetworkCache:
    """The network of the last call. A copy begins empty."""

    def __init__(self):
        self._last: tuple[list, Network] | None = None

    def __deepcopy__(self, memo) -> "NetworkCache":
        return NetworkCache()

    def __reduce__(self):
        return NetworkCache, ()

    def of(self, unet: UNet, device: torch.device, dtype: torch.dtype, backend: str) -> Network:
        """`make_network`, made anew where a weight is not what it was."""
        refused = unsupported(unet, dtype)  # hooks may have come
        key = [device, dtype, backend, unet.training, refused, _native.simd_in_use(), *_state(unet)]
        last = self._last
        if last is None or last[0] != key:
            last = self._last = None  # frees the memory first
            with torch.inference_mode(False), torch.no_grad():  # later calls may be in any mode
                last = self._last = (key, make_network(unet, device, dtype, backend))
        return last[1]


def _state(unet: UNet) -> list:
    parameters = list(unet.parameters())
    # Writing through `.data` changes no version, so the values count too.
    sums = torch.stack([p.detach().sum(dtype=torch.float32) for p in parameters]).tolist()
    return [(p.data_ptr(), None if p.is_inference() else p._version) for p in parameters] + sums
