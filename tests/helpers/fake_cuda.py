"""Networks on a CUDA device that is not there: fake tensors, which have shapes and layouts but no numbers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion import UNet, UNetConfig
from diffusion.inference import denoiser
from diffusion.inference.denoiser import Denoiser
from diffusion.kernels import _native, _triton
from diffusion.kernels.ops.attention import native as attention
from diffusion.models import unet

CUDA = torch.device("cuda", 0)
TINY = UNetConfig(
    sample_size=8, channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_levels=(1,), norm_groups=4
)


@contextmanager
def on_fake_cuda() -> Iterator[FakeTensorMode]:
    """Within, tensors on CUDA devices are fake ones, of a device with this package's CUDA kernels.

    Networks count as unaltered in spite of that.
    """
    replaced = [
        (denoiser, "altered", lambda network: None),
        (unet, "check_fits", lambda *args: None),  # asks for the memory of the device
        (_native, "CUDA_MISSING", None),
        (attention, "_shared_memory", lambda index: 227 << 10),
        (_triton, "_too_old", lambda index: None),
        (torch.nn.Module, "to", lambda module, *args: module),  # a module cannot swap its fake weights
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def fake_unet(config: UNetConfig = TINY, dtype: torch.dtype = torch.float32) -> UNet:
    """A new UNet on the device; to be called within `on_fake_cuda`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(CUDA):
            return UNet(config).eval()
    finally:
        torch.set_default_dtype(before)


def fake_denoiser(
    config: UNetConfig = TINY, dtype: torch.dtype = torch.float32, tf32: bool = False
) -> Denoiser:
    """The Denoiser of a new UNet on the device; to be called within `on_fake_cuda`."""
    return denoiser.make_denoiser(fake_unet(config), CUDA, dtype, "auto", tf32)
