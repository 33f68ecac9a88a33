"""Convolutions of numbers that are not finite, very large, very small, or cancel."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion.kernels import conv3x3, pack_conv3x3
from diffusion.kernels.ops.convolution.library import convolution_
from diffusion.kernels.ops.convolution.packing import Packing, pack
from diffusion.kernels.ops.group_norm_silu.library import group_norm_affine_
from helpers.conv3x3 import DTYPES, EXACT, PACKINGS, bounded, runnable
from helpers.native import requires_amx, requires_native
from helpers.tensors import channels_last


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("row", "column"), [(9, 9), (0, 16), (4, 3)])
def test_what_is_not_finite_spoils_what_reads_it(row, column, value, simd):
    """Nine pixels of each output, or fewer at an edge, and no other tile or image."""
    x, weight = channels_last(2, 20, 18, 17), channels_last(18, 20, 3, 3, seed=1)
    x[0, 3, row, column] = value
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    for packing in runnable(simd):
        packed = pack(weight, packing)
        actual = conv3x3(x, packed, backend="cpp")
        assert torch.equal(actual.isfinite(), expected.isfinite()), packing
        if packing in EXACT and not packing.amx_limbs:
            assert torch.equal(actual.isnan(), expected.isnan()), packing
        sound = expected.isfinite()
        error = (actual - expected)[sound].abs().max() / expected[sound].abs().max()
        assert error <= 2e-5 + packed.accuracy, packing


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e18, 1e20, 1e36, 1e37])
def test_large_numbers_whose_sums_are_finite(size, dtype, scale, simd):
    """Sums are finite, too, with the residual in the output, and with other images of order one."""
    x = channels_last(3, 37, 9, 10).to(dtype).float()
    x[1] *= size
    map = torch.stack([torch.zeros(3, 37), torch.ones(3, 37), torch.zeros(3, 37)])
    weight, bias = channels_last(70, 37, 3, 3, seed=1) / 24, torch.linspace(-1, 1, 70)
    residual = channels_last(3, 70, 9 * scale, 10 * scale, seed=2).to(dtype).float()
    residual[1] *= size
    scaled = F.interpolate(x.double(), scale_factor=scale) if scale > 1 else x.double()
    expected = F.conv2d(scaled, weight.double(), bias.double(), padding=1) + residual.to(dtype).double()
    for packing in runnable(simd, [p for p in PACKINGS if p.amx_limbs != 3]):
        packed, out = pack(weight, packing), residual.to(dtype, copy=True)
        convolution_(
            x.to(dtype),
            *(packed.data, 3, 1, 1, scale, packing.winograd_m, packing.amx_limbs, bias, map, False, out, out),
            panel=packing.panel,
        )
        for actual, image in zip(out, expected, strict=True):
            error = (actual.double() - image).abs().max() / image.abs().max()
            assert error <= 2e-5 + packed.accuracy + torch.finfo(dtype).eps / 2, packing


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_weight_that_is_not_finite_or_all_but_infinite(value, simd):
    """The weight spoils its own output alone; the largest finite number spoils none."""
    x, weight = 1e-3 * channels_last(2, 20, 12, 12), channels_last(18, 20, 3, 3, seed=1)
    weight[5, 3] = value
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    sound = [k for k in range(18) if k != 5 or math.isfinite(value)]
    for packing in runnable(simd):
        packed = pack(weight, packing)
        actual = conv3x3(x, packed, backend="cpp")
        assert actual[:, 5].isfinite().all() == math.isfinite(value), packing
        error = (actual - expected)[:, sound].abs().max() / expected[:, sound].abs().max()
        assert error <= 2e-5 + packed.accuracy, packing


@pytest.mark.thinned
@requires_native
@requires_amx
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "scale"),
    [(3, 1, 1, 1), (3, 1, 1, 2), (3, 2, 1, 1), (3, 2, 0, 1), (1, 1, 0, 1), (1, 2, 0, 1)],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_spoil_the_outputs_that_read_them(kernel, stride, padding, scale, value):
    """NaN and infinity spoil only the outputs that read them; the scale comes from the finite values."""
    x = channels_last(3, 20, 9, 10)
    x[1, 17, 4, 5] = x[1, 2, 8, 0] = value
    weight = channels_last(18, 20, kernel, kernel)
    padded = (padding, kernel // 2, padding, kernel // 2)
    scaled = torch.nn.functional.interpolate(x, scale_factor=scale) if scale > 1 else x
    expected = torch.nn.functional.conv2d(torch.nn.functional.pad(scaled, padded), weight, stride=stride)
    out = torch.empty_like(expected, memory_format=torch.channels_last)
    data = pack(weight, Packing(amx_limbs=3)).data
    convolution_(x, data, kernel, stride, padding, scale, 0, 3, None, None, False, None, out)
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert torch.equal(out.isnan(), ~out.isfinite())
    torch.testing.assert_close(out[out.isfinite()], expected[expected.isfinite()], rtol=0, atol=1e-4)


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(2, 24, 9, 31), (1, 70, 1, 1), (3, 16, 40, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "shift"), [(1, 0), (1e-4, 0), (0.1, -1), (1, -4), (1, -30), (0.3, 5)])
def test_bounds_of_a_map(dtype, shape, silu, size, shift):
    """The bounds are the largest magnitudes of each mapped channel."""
    x = 3 + channels_last(*shape, dtype=dtype)
    n, c = shape[:2]
    weight, bias = channels_last(2, c, 1, 1).flatten(1).unbind(0)
    weight, bias, map = size * weight, size * bias + shift, torch.empty(4, n, c)
    group_norm_affine_(x, 2, weight, bias, 1e-5, None, None, None, silu, map)
    z = F.group_norm(x.double(), 2, weight.double(), bias.double())
    ends = torch.stack([z.amin((2, 3)), z.amax((2, 3))])
    reached = (F.silu(ends) if silu else ends).abs().amax(0)
    if silu:  # and what lies between may reach -0.28
        lowest = 0.27846454276107
        reached = torch.where((ends[0] < -1.27846) & (ends[1] > -1.27846), reached.clamp_min(lowest), reached)
    torch.testing.assert_close(map[3].double(), reached, rtol=1e-4, atol=1e-5 * size)
    x[0, 0, 0, 0] = float("nan")
    group_norm_affine_(x, 2, weight, bias, 1e-5, None, None, None, silu, map)
    assert map[3, 0, : c // 2].isnan().all()
    assert map[3, 0, c // 2 :].isfinite().all()


def relative_error(actual, x, weight, **options):
    expected = conv3x3(x.double(), weight.double(), **options, backend="reference")
    return (actual - expected).abs().max() / expected.abs().max()


@requires_native
@pytest.mark.parametrize(
    ("option", "value", "most"),
    [("norm_weight", size, 1e-5) for size in (1e-2, 1e-4, 1e-6)]
    + [("norm_bias", shift, 2e-5) for shift in (-4.0, -10.0, -30.0)],
)
def test_small_activations(option, value, most):
    """SiLU of small numbers, and of numbers far below 0, is below its bound."""
    x, weight = channels_last(1, 64, 16, 16), channels_last(32, 64, 3, 3, seed=1)
    options = {"num_groups": 8, option: torch.full((64,), value), "activation": "silu"}
    actual = conv3x3(x, pack_conv3x3(weight, 16, 16), **options, backend="cpp")
    assert relative_error(actual, x, weight, **options) <= most


@requires_native
@pytest.mark.parametrize("seed", range(20))
def test_cancelling_maps(seed):
    """Gains of hundreds, with offsets that nearly cancel them: the bounds hold for the rounded results."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 16, 1, 1, generator=generator).expand(1, 16, 4, 4)
    gain, weight = torch.full((16,), 300.0), torch.rand(16, 16, 3, 3, generator=generator)
    bias = (0.005 - F.group_norm(x.double(), 2, gain.double()).mean((0, 2, 3))).float()
    options = {"num_groups": 2, "norm_weight": gain, "norm_bias": bias}
    errors = [
        relative_error(conv3x3(x, w, **options, backend=backend), x, weight, **options)
        for w, backend in ((pack_conv3x3(weight, 4, 4), "cpp"), (weight, "reference"))
    ]
    assert errors[0] <= 4 * errors[1] + 1e-5


@requires_native
@pytest.mark.parametrize(("size", "of_x"), [(1e-33, 1e20), (1e-17, 1e-17), (1e30, 1e-20), (1e-8, 1e37)])
@pytest.mark.parametrize("outputs", [1, 32])
def test_sizes_of_weights_and_images(size, of_x, outputs):
    """Very small or large, all of them or those of one output."""
    x, weight = of_x * channels_last(1, 64, 8, 8), channels_last(32, 64, 3, 3, seed=1) / 24
    weight[:outputs] *= size
    actual = conv3x3(x, pack_conv3x3(weight, 8, 8), backend="cpp")[:, :outputs]
    assert relative_error(actual, x, weight[:outputs]) <= 2e-5


@requires_native
def test_a_large_channel_that_nothing_reads():
    x, weight = channels_last(1, 64, 8, 8), channels_last(32, 64, 3, 3, seed=1)
    x[:, 3] *= 1e4
    weight[:, 3] = 0
    assert relative_error(conv3x3(x, pack_conv3x3(weight, 8, 8), backend="cpp"), x, weight) <= 1e-5


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("value", [-100.0, -1e4, -1e30, -1e38])
def test_what_silu_makes_nothing_of(value, packing):
    """The activation is 0 far below 0."""
    x, out = torch.full((1, 16, 8, 8), value), channels_last(1, 16, 8, 8)
    x = x.contiguous(memory_format=torch.channels_last)
    map = torch.stack([torch.zeros(1, 16), torch.full((1, 16), -1 / math.log(2)), torch.zeros(1, 16)])
    map = bounded(map, x, silu=True) if packing.amx_limbs == 3 else map
    packed = pack(torch.ones(16, 16, 3, 3), packing)
    convolution_(
        x, packed.data, 3, 1, 1, 1, packing.winograd_m, packing.amx_limbs, None, map, True, None, out
    )
    assert out.abs().max() <= 1e-30


@requires_native
@pytest.mark.parametrize("panel", [16, 64])
@pytest.mark.parametrize(("m", "bound"), [(2, 1), (4, 2.5)])
def test_winograds_error_beside_the_direct_sums(m, bound, panel, simd):
    """Root mean squares. F(4 x 4, 3 x 3) with the points 1 and 2 has 3.6 to 4.1 times the direct sum's."""
    x, weight = F.silu(channels_last(1, 96, 24, 24)), channels_last(64, 96, 3, 3, seed=1) / 29
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    direct, winograd = (
        (conv3x3(x, pack(weight, packing), backend="cpp") - expected).square().mean().sqrt()
        for packing in (Packing(panel=panel), Packing(m, panel=panel))
    )
    assert winograd <= bound * direct
