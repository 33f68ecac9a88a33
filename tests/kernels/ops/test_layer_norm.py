"""layer_norm_: against float64 by the rule of every op, over layouts, widths and instruction sets."""

import pytest
import torch
import torch.nn.functional as F

from diffusion.kernels._recorded_calls import recording
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.layer_norm.library import layer_norm_
from helpers.native import every_variant, requires_native
from helpers.tensors import channels_last

pytestmark = requires_native
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 20, 3, 5), (1, 1, 1, 1), (3, 64, 4, 4), (2, 77, 6, 1), (1, 320, 9, 1), (2, 7, 1, 6)]


def norm(x, weight, bias, eps, rms):
    """In PyTorch's functions, with the channels of x last."""
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def complaint(out, x, weight, bias, eps, rms):
    rows = x.movedim(1, -1)
    cast = [None if v is None else v.to(x.dtype) for v in (weight, bias)]
    exact = [None if v is None else v.double() for v in (weight, bias)]
    return wrong(out.movedim(1, -1), norm(rows, *cast, eps, rms), norm(rows.double(), *exact, eps, rms))


@pytest.mark.thinned
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, rms, simd):
    torch.manual_seed(0)
    n, c, height, width = shape
    x = (channels_last(n, c + 5, height, width) * 3 + 1).to(dtype)[:, 2 : c + 2]
    wide = channels_last(n, c + 9, height, width, dtype=dtype)
    before, out = wide.clone(), wide[:, 4 : c + 4]
    weight, bias = torch.randn(c), torch.randn(c)
    for parameters in ((weight, bias), (weight, None), (None, None)):
        layer_norm_(x, *parameters, 1e-5, rms, out)
        assert complaint(out, x, *parameters, 1e-5, rms) is None
    assert torch.equal(wide[:, :4], before[:, :4])
    assert torch.equal(wide[:, c + 4 :], before[:, c + 4 :])


@pytest.mark.thinned
@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_a_mean_far_from_0(mean, simd):
    torch.manual_seed(0)
    x = channels_last(2, 320, 3, 3) + mean
    out = torch.empty_like(x)
    layer_norm_(x, None, None, 1e-5, False, out)
    assert complaint(out, x, None, None, 1e-5, False) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_normalize_of_lucidrains(dtype):
    torch.manual_seed(0)
    x, g = channels_last(2, 48, 5, 4, dtype=dtype), torch.randn(48)
    x[0, :, 1, 2] = 0
    out = torch.empty_like(x)
    layer_norm_(x, g, None, 1e-24 / 48, True, out)

    def normalised(x, g):
        return F.normalize(x, dim=1) * g[:, None, None] * 48**0.5

    assert wrong(out, normalised(x, g.to(dtype)), normalised(x.double(), g.double())) is None
    assert not out[0, :, 1, 2].any()


@pytest.mark.thinned
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_modulation_silu_and_residual(dtype, rms, simd):
    """y = norm * (1 + scale) + shift, silu(y) + residual, with other scales and shifts for each image."""
    torch.manual_seed(0)
    c = 40
    x, residual = (channels_last(3, c, 4, 5, dtype=dtype) for _ in range(2))
    weight, bias = torch.randn(c), torch.randn(c)
    scale, shift = torch.randn(3, 2 * c).chunk(2, dim=1)

    def formula(dtype):
        cast = [v.to(dtype) for v in (weight, bias)]
        y = norm(x.to(dtype).movedim(1, -1), *cast, 1e-5, rms).movedim(-1, 1)
        y = y * (1 + scale.to(dtype)[:, :, None, None]) + shift.to(dtype)[:, :, None, None]
        return F.silu(y) + residual.to(dtype)

    out = torch.empty_like(x)
    layer_norm_(x, weight, bias, 1e-5, rms, out, scale, shift, True, residual)
    assert wrong(out, formula(dtype), formula(torch.float64)) is None
    shared = residual.clone(memory_format=torch.channels_last)
    layer_norm_(x, weight, bias, 1e-5, rms, shared, scale, shift, True, shared)
    assert torch.equal(shared, out)


def test_a_sequence_in_place_recorded():
    torch.manual_seed(0)
    sequence = torch.randn(2, 77, 40)
    x = sequence.clone().transpose(1, 2)
    with recording() as recorded:
        layer_norm_(x, None, None, 1e-5, False, x)
    assert torch.equal(x.transpose(1, 2), sequence)
    recorded.run()
    torch.testing.assert_close(x.transpose(1, 2), F.layer_norm(sequence, (40,)))


def test_a_pixel_does_not_depend_on_the_others_or_the_threads():
    torch.manual_seed(0)
    x = channels_last(5, 1000, 8, 8, dtype=torch.bfloat16)
    for variant in every_variant():
        out, alone = torch.empty_like(x), torch.empty_like(x[:1])
        layer_norm_(x, None, None, 1e-5, False, out)
        for i in range(5):
            layer_norm_(x[i : i + 1], None, None, 1e-5, False, alone)
            assert torch.equal(out[i : i + 1], alone), variant


def test_nan_stays_in_its_pixel():
    x = channels_last(1, 20, 2, 2)
    x[0, 3, 1, 1] = float("nan")
    out = torch.empty_like(x)
    layer_norm_(x, None, None, 1e-5, False, out)
    assert out[0, :, 1, 1].isnan().all()
    assert out.isnan().sum() == 20


@pytest.mark.parametrize(
    ("x", "weight", "out", "message"),
    [
        (channels_last(1, 2, 3, 3), None, channels_last(1, 2, 3, 4), "one shape and dtype"),
        (channels_last(1, 2, 3, 3), None, channels_last(1, 2, 3, 3).half(), "one shape and dtype"),
        (channels_last(1, 2, 3, 3).double(), None, channels_last(1, 2, 3, 3).double(), "float32, bfloat16"),
        (torch.zeros(1, 2, 3, 3), None, channels_last(1, 2, 3, 3), "x must be channels_last"),
        (channels_last(1, 2, 3, 3), torch.ones(3), channels_last(1, 2, 3, 3), "weight must be contiguous"),
        (channels_last(1, 2, 3, 3), torch.ones(2).half(), channels_last(1, 2, 3, 3), "weight must be"),
    ],
)
def test_wrong_arguments(x, weight, out, message):
    with pytest.raises(RuntimeError, match=message):
        layer_norm_(x, weight, None, 1e-5, False, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": torch.ones(2)}, r"scale must be float32 \[N, C\]"),
        ({"shift": torch.ones(3, 2).mT}, r"shift must be float32 \[N, C\]"),
        ({"residual": channels_last(2, 3, 3, 4)}, "residual must have the shape and dtype of x"),
        ({"residual": torch.zeros(2, 3, 3, 3)}, "residual must be channels_last"),
    ],
)
def test_wrong_options(options, message):
    x = channels_last(2, 3, 3, 3)
    with pytest.raises(RuntimeError, match=message):
        layer_norm_(x, None, None, 1e-5, False, torch.empty_like(x), **options)


def test_empty_and_opcheck():
    layer_norm_(torch.zeros(0, 3, 2, 2), None, None, 1e-5, False, torch.zeros(0, 3, 2, 2))
    x = channels_last(1, 2, 3, 3)
    torch.library.opcheck(layer_norm_.default, (x, torch.ones(2), None, 1e-5, True, torch.empty_like(x)))
