"""Sampling on a CUDA device, with fake tensors and stand-ins for torch.cuda: no device is needed."""

import threading

import pytest
import torch

from diffusion import kernels
from diffusion.inference.denoiser import DenoiserCache
from diffusion.utils.device import float32_products
from helpers.fake_cuda import CUDA, fake_denoiser, on_fake_cuda
from helpers.models import make_model

SETTINGS = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)


def precisions() -> list[str]:
    return [setting.fp32_precision for setting in SETTINGS]


@torch.no_grad()
@pytest.mark.parametrize(("tf32", "expected"), [(False, "ieee"), (True, "tf32")])
def test_products_of_float32(tf32, expected, monkeypatch):
    """ "exact" is float32, although PyTorch's convolutions on CUDA are TF32 by default."""
    before, seen = precisions(), []

    def conv2d(*args, backend="auto", **options):
        seen.append(precisions())
        return kernels.conv2d(*args, backend="reference", **options)

    monkeypatch.setattr("diffusion.models.blocks.conv2d", conv2d)
    with on_fake_cuda():
        denoise = fake_denoiser(tf32=tf32)
        denoise(torch.zeros(2, 3, 8, 8, device=CUDA), torch.zeros(2, device=CUDA), None)
    assert seen
    assert all(setting == [expected] * 2 for setting in seen)
    assert precisions() == before


def test_settings_return_to_what_they_were():
    before = precisions()
    with float32_products(CUDA, tf32=False):
        with float32_products(CUDA, tf32=True):
            assert precisions() == ["tf32"] * 2
        assert precisions() == ["ieee"] * 2
    with pytest.raises(LookupError), float32_products(CUDA, tf32=True):
        raise LookupError
    assert precisions() == before
    with float32_products(torch.device("cpu"), tf32=False):
        assert precisions() == before


def test_one_thread_at_a_time_changes_the_settings():
    entered = threading.Event()

    def other():
        with float32_products(CUDA, tf32=True):
            entered.set()

    thread = threading.Thread(target=other)
    with float32_products(CUDA, tf32=False):
        thread.start()
        assert not entered.wait(0.1)
        assert precisions() == ["ieee"] * 2
    thread.join()
    assert entered.is_set()


def test_a_switch_of_precision_makes_another_denoiser(monkeypatch):
    monkeypatch.setattr("diffusion.inference.denoiser._make_denoiser", lambda *args: args)
    monkeypatch.setattr("diffusion.inference.denoiser._is_short_of_memory", lambda *args: False)
    unet, cache = make_model().unet, DenoiserCache()
    exact, rounded = (cache.get(unet, CUDA, torch.float32, "auto", tf32=tf32) for tf32 in (False, True))
    assert exact != rounded
    assert cache.get(unet, CUDA, torch.float32, "auto") is exact
