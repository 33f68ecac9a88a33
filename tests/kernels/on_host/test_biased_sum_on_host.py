"""biased_sum_: the CUDA kernel, built for the host, and the PyTorch that stands for it, against float64."""

import pytest
import torch

from diffusion.kernels._library import define
from diffusion.kernels.ops.biased_sum.library import biased_sum_
from helpers.cuda_on_host import on_host, requires_compiler  # noqa: F401

pytestmark = [requires_compiler, pytest.mark.usefixtures("on_host")]
ON_HOST = ("biased_sum",)

define(
    "on_host_biased_sum_",
    "(Tensor x, Tensor? bias, Tensor? residual, Tensor(a!) out, Tensor(b!)? copy, int scale) -> ()",
)


def on_the_host(x, bias, residual, out, copy=None, scale=1):
    torch.ops.fused_diffusion.on_host_biased_sum_(x, bias, residual, out, copy, scale)


def part(shape, dtype, more, first, generator):
    """A map in channels_last, of a range of the channels of one with `more` more."""
    n, c, h, w = shape
    whole = torch.randn(n, h, w, c + more, generator=generator).to(dtype).permute(0, 3, 1, 2)
    return whole, whole[:, first : first + c]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [on_the_host, biased_sum_])
@pytest.mark.parametrize(
    ("channels", "more", "scale", "given"),
    [
        (16, 0, 1, "br"),
        (16, 24, 1, "brc"),
        (16, 8, 2, "b"),
        (24, 8, 2, "brc"),
        (5, 3, 1, "rc"),
        (3, 0, 2, "b"),
        (8, 8, 1, ""),
    ],
)
def test_sums(function, channels, more, scale, given, dtype):
    generator = torch.Generator().manual_seed(0)
    shape, doubled = (2, channels, 3, 5), (2, channels, 3 * scale, 5 * scale)
    _, x = part(shape, dtype, more, more // 2, generator)
    bias = torch.randn(channels, generator=generator).to(dtype) if "b" in given else None
    residual = part(shape, dtype, more, more, generator)[1] if "r" in given else None
    whole, out = part(doubled, dtype, more, 0, generator)
    copy = part(doubled, dtype, more, more // 2, generator)[1] if "c" in given else None
    beside = whole[:, channels:].clone()
    expected = x.double()
    if bias is not None:
        expected = expected + bias.double()[None, :, None, None]
    if residual is not None:
        expected = expected + residual.double()
    if scale == 2:
        rows, columns = torch.arange(6) // 2, torch.arange(10) // 2
        expected = expected[:, :, rows][:, :, :, columns]
    function(x, bias, residual, out, copy, scale)
    rounding = 2 * torch.finfo(dtype).eps if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    for found in (out, out if copy is None else copy):
        assert ((found.double() - expected).abs() <= rounding * expected.abs() + 2e-6).all()
    assert torch.equal(whole[:, channels:], beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_the_place_of_its_input(dtype):
    generator = torch.Generator().manual_seed(0)
    x, residual = (part((2, 16, 2, 2), dtype, 0, 0, generator)[1] for _ in range(2))
    expected = (x.double() + residual.double()).to(dtype)
    on_the_host(x, None, residual, x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("wrong", ["shape", "dtype", "layout", "scale"])
def test_refusals(wrong):
    x = torch.zeros(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    out = {
        "shape": x[:, :, :1],
        "dtype": x.bfloat16(),
        "layout": x.contiguous(memory_format=torch.contiguous_format),
        "scale": x,
    }[wrong]
    with pytest.raises(RuntimeError):
        on_the_host(x, None, None, out, scale=3 if wrong == "scale" else 1)
