"""Convolutions of the fused UNet: values, other kernels, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.kernels import _native, conv3x3, explain, pack_conv3x3
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.convolution.cases import CONV3X3_CASES as CASES
from diffusion.kernels.ops.convolution.library import convolution_
from diffusion.kernels.ops.convolution.native import multiplies_bf16_pairs
from diffusion.kernels.ops.convolution.packing import Packing, pack
from helpers.conv3x3 import DTYPES, EXACT, PACKINGS, bounded, complaint, expected_of
from helpers.native import requires_native
from helpers.tensors import channels_last


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
@pytest.mark.parametrize(
    "case", ["odd", "many_blocks", "large_weight", "blocks_of_threads", "four_pixels", "upsampled"]
)
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
