"""More than 2**31 elements: slow, and only where there is memory enough."""

import os

import pytest
import torch

from diffusion.kernels import group_norm_silu, philox_normal

GIB = 2**30
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if hasattr(os, "sysconf") else 0
pytestmark = pytest.mark.slow


def needs(gib):
    return pytest.mark.skipif(gib * GIB > MEMORY, reason=f"needs {gib} GiB of free memory")


@needs(11)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_group_norm_silu(channels_last):
    """The last of two groups has the same result in the whole tensor as alone."""
    x = torch.empty(1, 4, 2**15, 2**14 + 8, dtype=torch.bfloat16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x.copy_(torch.linspace(-2, 2, x.shape[-1]))
    x[:, 3] += 1
    y = group_norm_silu(x, 2, backend="cpp")
    alone = x[:, 2:, -64:].double()
    count = x[:, 2:].numel()
    moments = torch.linspace(-2, 2, x.shape[-1]).to(torch.bfloat16).double()
    rows = torch.stack([moments, (moments.to(torch.bfloat16) + 1).double()])
    mean = rows.mean()
    variance = (rows - mean).square().mean()
    assert count == rows.numel() * x.shape[2]
    z = (alone - mean) / (variance + 1e-5).sqrt()
    expected = z / (1 + torch.exp(-z))
    torch.testing.assert_close(y[:, 2:, -64:].double(), expected, rtol=2**-7, atol=2**-9)


@needs(18)
def test_philox_normal():
    ids = torch.tensor([3, 8])
    both = philox_normal((2, 2**30 + 36), seed=1, sample_ids=ids, backend="cpp")
    alone = philox_normal((1, 2**30 + 36), seed=1, sample_ids=ids[1:], backend="cpp")
    assert both.numel() > 2**31
    assert torch.equal(both[1, -(2**20) :], alone[0, -(2**20) :])
    reference = philox_normal((1, 4096), seed=1, sample_ids=ids[1:], backend="reference")
    torch.testing.assert_close(both[1, :4096], reference[0], rtol=2.0**-22, atol=0)
