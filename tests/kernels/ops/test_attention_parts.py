"""attention_amx_, attention as products of AMX's tiles: against float64, over sizes, strides and dtypes."""

import pytest
import torch

from diffusion.kernels import _native
from helpers.native import requires_amx

pytestmark = requires_amx

attention_amx_ = torch.ops.fused_diffusion.attention_amx_

# Errors relative to the largest output. Three splits hold a whole float32; one loses 2^-8, in two products.
ERRORS = {1: 2e-2, 3: 2e-6}
SHAPES = [(1, 1, 256, 256), (2, 4, 49, 32), (1, 2, 7, 40), (3, 1, 64, 128), (1, 1, 1000, 64), (2, 3, 17, 5)]
SHAPES += [(2, 1, 1, 1), (1, 1, 33, 300), (40, 1, 256, 64)]  # the last is packed in several groups


def inputs(shape, dtype, seed=0):
    """Views of one [B, S, 3, H, D], as a UNet has them, and the room for the output in [B, S, H, D]."""
    batch, heads, positions, width = shape
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, positions, 3, heads, width, generator=generator).to(dtype)
    out = torch.full((batch, positions, heads, width), torch.nan, dtype=dtype).transpose(1, 2)
    return *qkv.permute(2, 0, 3, 1, 4).unbind(0), out


def expected_of(q, k, v, scale):
    return (q.double() @ k.double().mT * scale).softmax(-1) @ v.double()


@pytest.mark.thinned
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, parts):
    q, k, v, out = inputs(shape, dtype)
    scale = shape[-1] ** -0.5
    attention_amx_(q, k, v, scale, parts, out)
    expected = expected_of(q, k, v, scale)
    rounding = torch.finfo(dtype).eps
    assert (out.double() - expected).abs().max() <= (ERRORS[parts] + rounding) * expected.abs().max()


def test_large_logits_choose_one_key():
    """The softmax is taken about its maximum."""
    q, k, v, out = inputs((1, 1, 40, 32), torch.float32)
    attention_amx_(q, k, v, 1e4, 3, out)
    expected = expected_of(q, k, v, 1e4)
    assert (out.double() - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("size", [5e4, 1e8])
def test_logits_whose_products_round(size):
    """The largest weight is 1, whatever rounding leaves of its logit."""
    q, k, v, out = inputs((1, 1, 40, 64), torch.float32)
    attention_amx_(q * size, k * size, v, 0.125, 3, out)
    chosen = (q.double() @ k.double().mT).argmax(-1)[0, 0]
    torch.testing.assert_close(out[0, 0], v[0, 0, chosen], rtol=1e-5, atol=1e-5)


def test_a_head_does_not_depend_on_the_others_or_the_threads():
    q, k, v, out = inputs((5, 2, 49, 48), torch.float32)
    attention_amx_(q, k, v, 0.2, 3, out)
    alone = torch.empty_like(out[3:4])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        attention_amx_(q[3:4], k[3:4], v[3:4], 0.2, 3, alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, out[3:4])


def test_nan_stays_in_its_rows():
    q, k, v, out = inputs((1, 2, 49, 48), torch.float32)
    q[0, 0, 5] = torch.nan
    v[0, 1, :, 7] = torch.nan
    attention_amx_(q, k, v, 0.2, 3, out)
    spoiled = torch.zeros(1, 2, 49, 48, dtype=torch.bool)
    spoiled[0, 0, 5] = spoiled[0, 1, :, 7] = True
    assert torch.equal(out.isnan(), spoiled)


def test_what_is_refused():
    q, k, v, out = inputs((1, 1, 8, 8), torch.float32)
    with pytest.raises(RuntimeError, match="splits must be 1 or 3"):
        attention_amx_(q, k, v, 1.0, 2, out)
    with pytest.raises(RuntimeError, match="k must be"):
        attention_amx_(q, k[..., :4], v, 1.0, 3, out)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        attention_amx_(*(t.double() for t in (q, k, v)), 1.0, 3, out.double())
    _native.use_simd("avx2")
    try:
        with pytest.raises(RuntimeError, match="no AMX"):
            attention_amx_(q, k, v, 1.0, 2, out)
    finally:
        _native.use_simd("best")


def test_opcheck():
    q, k, v, out = inputs((1, 2, 9, 16), torch.float32)
    torch.library.opcheck(attention_amx_.default, (q, k, v, 0.25, 3, out))
