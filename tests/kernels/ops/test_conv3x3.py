"""conv3x3 and its parts: against float64, over instruction sets, tiles, layouts and sizes."""

import math

import pytest
import torch
import torch.nn.functional as F

from diffusion.kernels import _native, conv3x3, explain, pack_conv3x3
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.convolution.cases import CONV3X3_CASES as CASES
from diffusion.kernels.ops.convolution.library import convolution_
from diffusion.kernels.ops.convolution.native import multiplies_bf16_pairs
from diffusion.kernels.ops.convolution.packing import PANEL, Packing, choose_packing, pack
from diffusion.kernels.ops.group_norm_silu.library import group_norm_affine_
from helpers.native import requires_amx, requires_native
from helpers.tensors import channels_last

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every packing that this processor can multiply; others are left out, as there is nothing to run them on.
PACKINGS = [Packing(0), Packing(2), Packing(4)]
PACKINGS += [Packing(0, panel=16), Packing(2, panel=16), Packing(4, panel=16)]
PACKINGS += [Packing(0, bf16_pairs=True), Packing(2, bf16_pairs=True)] if multiplies_bf16_pairs() else []
PACKINGS += [Packing(amx_limbs=1), Packing(amx_limbs=3)] if "amx" in _native.simd_variants() else []
EXACT = [packing for packing in PACKINGS if not packing.bf16_pairs and packing.amx_limbs != 1]


def as_double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def expected_of(args, options):
    return conv3x3(
        *map(as_double, args), **{name: as_double(v) for name, v in options.items()}, backend="reference"
    )


def complaint(actual, args, options, packed) -> str | None:
    """The reason why `actual` exceeds the error bound, with the algorithm's documented extra error."""
    peer = conv3x3(*args, **options, backend="reference")
    return wrong(actual, peer, expected_of(args, options), accuracy=packed.accuracy)


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("tile", [0, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_parity(case, dtype, tile, simd):
    args, options = CASES[case].inputs(dtype)
    packed = pack(args[1], Packing(tile))
    actual = conv3x3(args[0], packed, args[2], **options, backend="cpp")
    assert actual.dtype == dtype
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert complaint(actual, args, options, packed) is None


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("packing", PACKINGS[3:], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_products_of_bfloat16(case, dtype, packing):
    """Inputs and weights are rounded to bfloat16, or split into three limbs, for every dtype of x."""
    args, options = CASES[case].inputs(dtype)
    packed = pack(args[1], packing)
    actual = conv3x3(args[0], packed, args[2], **options, backend="cpp")
    assert actual.dtype == dtype
    assert complaint(actual, args, options, packed) is None


@requires_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_what_auto_and_packing_choose(case, dtype):
    args, options = CASES[case].inputs(dtype)
    factor = 2 if options["upsample"] else 1
    packed = pack_conv3x3(args[1], *(factor * size for size in args[0].shape[2:]), dtype)
    assert packed.packing in (EXACT if dtype != torch.bfloat16 or not multiplies_bf16_pairs() else PACKINGS)
    assert complaint(conv3x3(args[0], packed, args[2], **options), args, options, packed) is None


def composed(x, weight, bias, *, num_groups, norm_weight, norm_bias, add, scale, shift, residual):
    """The docstring's formula in PyTorch's functions, with an upsampling."""
    h = F.group_norm(x + add[:, :, None, None], num_groups, norm_weight, norm_bias, 1e-5)
    h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    h = F.interpolate(h * torch.sigmoid(h), scale_factor=2, mode="nearest")
    return F.conv2d(h, weight, bias, padding=1) + residual


@pytest.mark.thinned
@pytest.mark.parametrize("shape", [(2, 6, 0, 5), (2, 6, 5, 0), (0, 6, 0, 0), (0, 6, 4, 4)], ids=str)
@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("num_groups", [None, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_maps_without_pixels(shape, upsample, num_groups, layout, backend):
    """Empty maps have an empty output, and gradients of 0."""
    factor = 2 if upsample else 1
    height, width = (factor * size for size in shape[2:])
    x, weight = torch.zeros(shape).to(memory_format=layout), torch.ones(7, 6, 3, 3)
    options = {"upsample": upsample, "num_groups": num_groups, "backend": backend}
    residual = torch.zeros(shape[0], 7, height, width)
    packed = pack_conv3x3(weight, height, width)
    assert conv3x3(x, packed, torch.ones(7), residual=residual, **options).shape == residual.shape
    leaves = [t.requires_grad_() for t in (x, weight, torch.ones(7))]
    conv3x3(*leaves, residual=residual, **options).sum().backward()
    assert not any(t.grad.any() for t in leaves)


@pytest.mark.thinned
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_result_has_the_dtype_of_x(dtype, other, backend):
    """The dtypes of bias and residual do not matter."""
    args, options = CASES["four_pixels"].inputs(dtype)
    options["residual"] = options["residual"].to(other)
    packed = pack_conv3x3(args[1], 4, 4, dtype)
    assert conv3x3(args[0], packed, args[2].to(other), **options, backend=backend).dtype == dtype


def test_reference_is_the_formula():
    generator = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    args = (normal(2, 6, 4, 5), normal(3, 6, 3, 3), normal(3))
    options = {
        "num_groups": 2,
        "norm_weight": normal(6),
        "norm_bias": normal(6),
        "add": normal(2, 6),
        "scale": normal(2, 6),
        "shift": normal(2, 6),
        "residual": normal(2, 3, 8, 10),
    }
    actual = conv3x3(*args, **options, activation="silu", upsample=True, backend="reference")
    torch.testing.assert_close(actual, composed(*args, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("case", ["odd", "many_blocks", "four_pixels", "upsampled"])
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_an_image_does_not_depend_on_its_batch_or_the_threads(case, packing):
    args, options = CASES[case].inputs(torch.float32)
    packed = pack(args[1], packing)

    def some(images):
        chosen = {
            name: value[images] if name in ("add", "scale", "shift", "residual") else value
            for name, value in options.items()
        }
        return conv3x3(args[0][images], packed, args[2], **chosen, backend="cpp")

    together, threads = some(slice(None)), torch.get_num_threads()
    assert torch.equal(some(slice(1, 2)), together[1:2])
    try:
        torch.set_num_threads(3)
        assert torch.equal(some(slice(None)), together)
    finally:
        torch.set_num_threads(threads)


def bounded(map, x, silu=False):
    """An affine map, with bounds of its values for x."""
    centre, gain, offset = (m.double()[:, :, None, None] for m in map)
    z = (x.double() - centre) * gain + offset
    z = F.silu(-math.log(2) * z) if silu else z
    return torch.cat([map, 1.001 * z.abs().amax((2, 3)).float()[None]])


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "below"),
    [
        (1, 1, 0, 0),
        (1, 1, 0, 2),
        (1, 1, 1, 0),
        (1, 2, 0, 0),
        (3, 2, 1, 1),
        (3, 2, 0, 1),
        (3, 1, 1, 1),
        (3, 1, 0, 0),
        (3, 1, 1, 2),
        (3, 1, 2, 1),
    ],
)
def test_other_convolutions(kernel, stride, padding, below, normalised, dtype, simd):
    packings = [
        packing for packing in EXACT if not packing.winograd_m and (simd == "amx" or not packing.amx_limbs)
    ]
    for packing in packings:
        check_other_convolution(kernel, stride, padding, below, normalised, dtype, packing)


def check_other_convolution(kernel, stride, padding, below, normalised, dtype, packing):
    """The convolutions of resampling and attention, from and to some channels of wider images."""
    wide = channels_last(2, 40, 12, 32, dtype=dtype)
    x = wide[:, 3:26]
    weight = channels_last(70, 23, kernel, kernel, seed=1) / (23 * kernel**2) ** 0.5
    bias = torch.linspace(-1, 1, 70)
    height, width = ((size + padding + below - kernel) // stride + 1 for size in x.shape[2:])
    room = channels_last(2, 90, height, width, dtype=dtype)
    before, out = room.clone(), room[:, 11:81]
    map = torch.randn(3, 2, 23, generator=torch.Generator().manual_seed(2)) if normalised else None
    if normalised and packing.amx_limbs == 3:
        map = bounded(map, x)
    packed = pack(weight, packing)
    residual = before[:, 11:81].clone(memory_format=torch.channels_last)
    convolution_(
        *(x, packed.data, kernel, stride, padding, 1, 0, packing.amx_limbs, bias, map, False, out, out),
        panel=packing.panel,
    )  # the residual is out

    def plain(dtype):
        h = x.to(dtype)
        if normalised:
            centre, gain, offset = (m.to(dtype)[:, :, None, None] for m in map[:3])
            h = (h - centre) * gain + offset
        h = F.pad(h, (padding, below, padding, below))
        return F.conv2d(h, weight.to(dtype), bias.to(dtype), stride) + residual.to(dtype)

    assert wrong(out, plain(dtype), plain(torch.float64), accuracy=packed.accuracy) is None
    untouched = torch.cat([room[:, :11], room[:, 81:]], 1)
    assert torch.equal(untouched, torch.cat([before[:, :11], before[:, 81:]], 1))


@requires_native
def test_opcheck():
    x, out = channels_last(2, 8, 8, 8), channels_last(2, 16, 8, 8)
    packed = pack(channels_last(16, 8, 3, 3), Packing(4))
    map = torch.ones(3, 2, 8)
    torch.library.opcheck(
        torch.ops.fused_diffusion.convolution_.default,
        (x, packed.data, 3, 1, 1, 1, 4, 0, torch.ones(16), map, True, None, out),
    )
    torch.library.opcheck(
        torch.ops.fused_diffusion.group_norm_affine_.default,
        (x, 4, torch.ones(8), None, 1e-5, None, None, None, True, map),
    )


@requires_native
def test_compiled_without_a_graph_break():
    args, options = CASES["odd"].inputs(torch.float32)
    packed = pack_conv3x3(args[1], *args[0].shape[2:])

    def run(x, bias):
        return conv3x3(x, packed, bias, **options, backend="cpp") * 2

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(args[0], args[2]), run(args[0], args[2]))


def runnable(simd, packings=PACKINGS):
    """The packings that an instruction set multiplies."""
    pairs = simd in ("avx512_bf16", "amx")
    return [p for p in packings if (not p.amx_limbs or simd == "amx") and (not p.bf16_pairs or pairs)]


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


def test_the_packed_weight_is_whole():
    """Zero beyond the weight, and each number of it where the product reads it."""
    weight = torch.arange(70 * 5 * 9, dtype=torch.float32).reshape(70, 5, 3, 3)
    data = pack(weight, Packing()).data.flatten()
    first, last = data[: 9 * 5 * PANEL].reshape(9, 5, PANEL), data[9 * 5 * PANEL :].reshape(9, 5, 16)
    taps = weight.permute(2, 3, 1, 0).flatten(0, 1)
    assert torch.equal(first, taps[:, :, :PANEL])
    assert torch.equal(last[:, :, :6], taps[:, :, PANEL:])
    assert not last[:, :, 6:].any()


def test_the_weight_in_tiles_is_whole():
    """[panel][chunk][tap][tile][pair of channels][output][2], zero beyond the weight."""
    weight = torch.randn(40, 35, 3, 3, generator=torch.Generator().manual_seed(0))
    data = pack(weight, Packing(amx_limbs=1)).data
    words = 2 * 9 * 512  # a tile for each chunk and tap
    assert data.dtype == torch.bfloat16
    assert data.shape == (3 * words,)
    panels = data[: 2 * words].view(2, 9, 2, 16, 16, 2), data[2 * words :].view(2, 9, 1, 16, 16, 2)
    found = torch.cat(panels, 2).permute(2, 4, 0, 3, 5, 1).reshape(48, 64, 3, 3)
    assert not found[40:].any()
    assert not found[:, 35:].any()
    assert torch.equal(found[:40, :35], weight.bfloat16())


def test_the_weight_in_limbs_is_whole():
    """[scales][panel: 16 scales, [chunk][tap][limb][tile]]; tiles [4i + j][output][k] of 16j + 4i + k."""
    weight = torch.randn(20, 70, 3, 3, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1e-42
    weight[17] = 0
    weight[18] *= 1e30
    weight[:, 5] *= 1e-3
    weight[:, 6] = 0
    data = pack(weight, Packing(amx_limbs=3)).data
    assert data.dtype == torch.int8
    channel_scales, data = data[: 4 * 128].view(torch.float32).double(), data[4 * 128 :]
    heads, tiles = data.view(2, -1).split([256, 2 * 9 * 3 * 1024], 1)
    scales = heads[:, :64].contiguous().view(torch.float32).flatten().double()
    limbs = tiles.reshape(2, 2, 9, 3, 4, 4, 16, 4).double()  # [panel, chunk, tap, limb, i, j, output, k]
    whole = limbs[:, :, :, 0] + limbs[:, :, :, 1] / 2**8 + limbs[:, :, :, 2] / 2**16
    found = whole.permute(0, 5, 1, 4, 3, 6, 2).reshape(32, 128, 3, 3) * scales[:, None, None, None]
    assert limbs[:, :, :, 0].abs().max() == 127
    sums = heads[:, 64:].contiguous().view(torch.int32).view(2, 3, 16)
    assert torch.equal(sums, 96 * limbs.sum((1, 2, 4, 5, 7)).int())
    found *= channel_scales[:, None, None]
    assert not channel_scales[70:].any()
    assert torch.equal(channel_scales.log2().round(), channel_scales.log2())
    assert not found[20:].any()
    assert not found[:, 70:].any()
    largest = (weight.double() / channel_scales[:70, None, None]).abs().amax((1, 2, 3), keepdim=True)
    errors = (found[:20, :70] - weight.double()).abs() / channel_scales[:70, None, None]
    assert (errors <= largest * 2.0**-23.5 + 2.0**-143).all()


@pytest.mark.parametrize(("channels", "beside"), [(5, 3), (16, 3), (17, 2), (32, 2)])
def test_few_channels_stand_beside_those_of_the_next_taps(channels, beside):
    weight = torch.randn(20, channels, 3, 3, generator=torch.Generator().manual_seed(0))
    taps, own = -(-3 // beside), 16 if channels <= 16 else 32
    channel_scales, data = pack(weight, Packing(amx_limbs=3)).data.tensor_split([4 * 64])
    channel_scales = channel_scales.view(torch.float32)[:channels, None]
    heads, tiles = data.view(2, -1).split([256, 3 * taps * 3 * 1024], 1)
    limbs = tiles.reshape(2, 3, taps, 3, 4, 4, 16, 4).double()  # [panel, row, taps, limb, i, j, output, k]
    whole = limbs[:, :, :, 0] + limbs[:, :, :, 1] / 2**8 + limbs[:, :, :, 2] / 2**16
    found = whole.permute(0, 5, 4, 3, 6, 1, 2).reshape(32, 64, 3, taps)  # [output, j i k, row, taps]
    found *= heads[:, :64].contiguous().view(torch.float32).flatten()[:, None, None, None]
    for column in range(3):
        first = column % beside * own
        part = found[:20, first : first + channels, :, column // beside] * channel_scales
        torch.testing.assert_close(part, weight[:, :, :, column].double(), rtol=1e-6, atol=1e-6)
    assert found.count_nonzero() <= weight.numel()


@requires_native
@requires_amx
@pytest.mark.parametrize("channels", [12, 70])
def test_channels_of_unequal_size(channels):
    """Channels a thousand times as large as others, with weights as much smaller, cost the others nothing."""
    x, weight = channels_last(2, channels, 9, 9), channels_last(20, channels, 3, 3, seed=1)
    sizes = torch.logspace(-6, 6, channels)
    packed = pack(weight / sizes[:, None, None], Packing(amx_limbs=3))
    unequal = x * sizes[:, None, None]
    expected = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    actual = conv3x3(unequal, packed, backend="cpp")
    assert (actual - expected).abs().max() <= 4e-6 * expected.abs().max()


@pytest.mark.parametrize(
    ("size", "small", "large", "pairs"),
    [(1, 0, 0, 0), (2, 0, 0, 0), (4, 2, 2, 2), (8, 4, 2, 2), (14, 4, 4, 2)],
)
def test_packings_by_size(size, small, large, pairs):
    single, half, vectors = torch.float32, torch.bfloat16, "avx512_bf16"
    assert choose_packing((96, 96, 3, 3), size, 64, single, vectors) == Packing(small)
    assert choose_packing((256, 256, 3, 3), 64, size, single, vectors) == Packing(large)
    assert choose_packing((96, 96, 3, 3), size, size, half, vectors) == Packing(pairs, bf16_pairs=True)
    assert choose_packing((96, 96, 3, 3), size, size, half, "avx512") == Packing(small)
    assert choose_packing((96, 96, 3, 3), size, size, single, vectors, winograd=False) == Packing()
    assert choose_packing((64, 3, 3, 3), size, size, single, "amx") == Packing()
    for narrow in ("avx2", "baseline"):
        assert choose_packing((96, 96, 3, 3), size, size, single, narrow) == Packing(small, panel=16)
        assert choose_packing((64, 3, 3, 3), size, size, half, narrow) == Packing(panel=16)
    for shape in ((96, 96, 3, 3), (256, 256, 3, 3), (256, 256, 1, 1)):
        assert choose_packing(shape, size, 64, single, "amx", winograd=shape[2] == 3) == Packing(amx_limbs=3)
    assert choose_packing((16, 3884, 3, 3), size, size, single, "amx") == Packing(large)
    assert choose_packing((96, 96, 3, 3), size, size, half, "amx") == Packing(amx_limbs=1)


@pytest.mark.parametrize(
    ("shape", "packing"),
    [
        ((8, 8, 1, 1), Packing(2)),
        ((8, 8, 3, 1), Packing()),
        ((8, 8, 5, 5), Packing()),
        ((8, 8, 3, 3), Packing(3)),
        ((8, 8, 3, 3), Packing(amx_limbs=2)),
        ((8, 8, 3, 3), Packing(panel=32)),
        ((8, 8, 3, 3), Packing(2, amx_limbs=1)),
        ((8, 8, 3, 3), Packing(4, amx_limbs=3)),
        ((8, 8, 3, 3), Packing(bf16_pairs=True, amx_limbs=1)),
    ],
    ids=str,
)
def test_what_cannot_be_packed(shape, packing):
    with pytest.raises(ValueError, match="cannot be packed as"):
        pack(torch.zeros(shape), packing)


@requires_native
def test_weights_for_another_processor():
    """A weight packed for AMX is refused by a processor without it."""
    packed = pack(W, Packing(amx_limbs=3))
    _native.use_simd("baseline")
    try:
        assert "not cpp: the weight is packed for a processor with AMX" in explain("conv3x3", X, packed)
    finally:
        _native.use_simd("best")


X, W = torch.zeros(2, 4, 8, 8), torch.zeros(6, 4, 3, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv3x3(X[0], W), r"needs a floating-point x \[N, C, H, W\]"),
        (lambda: conv3x3(X, W[:, :3]), r"weight must have shape \[K, 4, 3, 3\], not \[6, 3, 3, 3\]"),
        (lambda: conv3x3(X, W[:, :, :1, :1]), r"weight must have shape \[K, 4, 3, 3\]"),
        (lambda: conv3x3(X, W, X.flatten()[:5]), r"bias must have shape \[6\], not \[5\]"),
        (lambda: conv3x3(X, W, residual=X), r"residual must have shape \[2, 6, 8, 8\], not \[2, 4, 8, 8\]"),
        (lambda: conv3x3(X, W, upsample=True, residual=X), r"residual must have shape \[2, 6, 16, 16\]"),
        (lambda: conv3x3(X, W, num_groups=3), "4 channels cannot be divided into 3 groups"),
        (lambda: conv3x3(X, W, activation="silu"), "without num_groups nothing is normalised"),
        (lambda: conv3x3(X, W, add=X[:, :, 0, 0]), "without num_groups nothing is normalised"),
        (lambda: conv3x3(X, W, num_groups=2, activation="relu"), "activation must be 'silu' or 'none'"),
        (lambda: conv3x3(X, W, num_groups=2, eps=-1.0), "eps must not be negative"),
        (lambda: conv3x3(X, W, num_groups=2, scale=X[:, :2, 0, 0]), r"scale must have shape \[2, 4\]"),
        (lambda: conv3x3(X, W, backend="cpp"), "the weight is not packed; see pack_conv3x3"),
        (lambda: pack_conv3x3(W[:, :, 0], 8, 8), r"needs a weight \[K, C, 3, 3\]"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@requires_native
def test_gradients_are_the_references():
    """The C++ backend computes none, and says so."""
    args, options = CASES["odd"].inputs(torch.float32)
    packed = pack_conv3x3(args[1], 7, 9)
    x = args[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="x requires a gradient, which this backend does not compute"):
        conv3x3(x, packed, args[2], **options, backend="cpp")
    assert "not cpp: x requires a gradient" in explain("conv3x3", x, packed, args[2], **options)
    conv3x3(x, packed, args[2], **options).sum().backward()
    again = args[0].double().requires_grad_()
    expected_of((again, args[1], args[2]), options).sum().backward()
    torch.testing.assert_close(x.grad.double(), again.grad, rtol=1e-4, atol=1e-4)


@requires_native
@pytest.mark.parametrize("packing", PACKINGS, ids=str)
def test_without_channels(packing):
    x, out = channels_last(1, 0, 4, 4), channels_last(1, 16, 4, 4)
    weight = torch.zeros(
        0, dtype=torch.bfloat16 if packing.bf16_pairs or packing.amx_limbs else torch.float32
    )
    with pytest.raises(RuntimeError, match="x must have a channel"):
        convolution_(
            x, weight, 3, 1, 1, 1, packing.winograd_m, packing.amx_limbs, None, None, False, None, out
        )


@pytest.mark.skipif(not multiplies_bf16_pairs(), reason="this processor has no AVX512_BF16")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pairs_by_one_pixel(dtype):
    """Only bfloat16 is read in place."""
    x, out = channels_last(1, 32, 4, 4, dtype=dtype), channels_last(1, 16, 4, 4, dtype=dtype)
    weight = channels_last(16, 32, 1, 1, seed=1) / 32**0.5
    packed = pack(weight, Packing(bf16_pairs=True))
    convolution_(x, packed.data, 1, 1, 0, 1, 0, 0, None, None, False, None, out)
    peer, expected = F.conv2d(x, weight.to(dtype)), F.conv2d(x.double(), weight.double())
    assert wrong(out, peer, expected, accuracy=packed.accuracy) is None


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
