"""attention_, which planned networks call on CPUs: against float64, on every instruction set."""

import pytest
import torch

from diffusion.kernels import _native
from diffusion.kernels._recorded_calls import recording
from helpers.native import TESTED, every_variant, requires_amx, requires_native

pytestmark = requires_native

attention_ = torch.ops.fused_diffusion.attention_

# Errors relative to the largest output, beside the output's rounding. Numbers rounded to bfloat16 lose 2^-8,
# in two products.
EXACT, FAST = 2e-6, 2e-2
# batch, heads, positions of the queries, positions of the keys, width
SHAPES = [(1, 1, 256, 256, 256), (2, 4, 49, 49, 32), (1, 2, 7, 7, 40), (3, 1, 64, 64, 128)]
SHAPES += [(1, 1, 1000, 1000, 64), (2, 3, 17, 17, 5), (2, 1, 1, 1, 1), (1, 1, 33, 33, 300)]
SHAPES += [(40, 1, 256, 256, 64), (1, 1, 40, 40, 512), (2, 2, 130, 77, 40), (1, 2, 64, 77, 80)]
SHAPES += [(1, 1, 16, 77, 160), (2, 1, 5, 1, 8), (1, 1, 1, 600, 16), (1, 2, 65, 257, 48)]
SHAPES += [(1, 1, 129, 513, 33), (1, 3, 300, 2, 17), (1, 1, 35, 1100, 72)]


@pytest.fixture(params=TESTED)
def simd(request):
    _native.use_simd(request.param)
    yield request.param
    _native.use_simd("best")


def heads_of(shape, count, dtype, generator):
    """Views [B, H, S, D] of one [B, S, count, H, D], as one projection gives them."""
    batch, heads, positions, width = shape
    numbers = torch.randn(batch, positions, count, heads, width, generator=generator)
    return numbers.to(dtype).permute(2, 0, 3, 1, 4).unbind(0)


def inputs(shape, dtype, seed=0):
    """q, k and v of one projection, or of two; out is some of the channels of a wider map."""
    batch, heads, positions, keys, width = shape
    generator = torch.Generator().manual_seed(seed)
    if positions == keys:
        q, k, v = heads_of((batch, heads, positions, width), 3, dtype, generator)
    else:
        (q,) = heads_of((batch, heads, positions, width), 1, dtype, generator)
        k, v = heads_of((batch, heads, keys, width), 2, dtype, generator)
    wide = torch.full((batch, positions, heads * width + 8), torch.nan, dtype=dtype)
    out = wide[:, :, 4 : 4 + heads * width].view(batch, positions, heads, width).transpose(1, 2)
    return q, k, v, out


def expected_of(q, k, v, scale):
    return (q.double() @ k.double().mT * scale).softmax(-1) @ v.double()


def check(q, k, v, scale, fast, out):
    attention_(q, k, v, scale, fast, out)
    expected = expected_of(q, k, v, scale)
    error = (FAST if fast else EXACT) + torch.finfo(q.dtype).eps
    assert (out.double() - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.thinned
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, fast, simd):
    q, k, v, out = inputs(shape, dtype)
    check(q, k, v, shape[-1] ** -0.5, fast, out)
    memory = torch.as_strided(out, (out.untyped_storage().nbytes() // out.element_size(),), (1,), 0)
    assert memory.isnan().sum() == 8 * shape[0] * shape[2]  # nothing beside `out` is written


@pytest.mark.thinned
@pytest.mark.parametrize("fast", [False, True])
def test_heads_in_either_order(fast, simd):
    """Contiguous [B, H, S, D], and [B, S, H, D], misaligned, give the same bits."""
    q, k, v, out = inputs((2, 3, 70, 70, 24), torch.float32)
    attention_(q, k, v, 0.2, fast, out)
    shifted = [torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t) for t in (q, k, v)]
    contiguous = torch.empty_like(out, memory_format=torch.contiguous_format)
    attention_(*shifted, 0.2, fast, contiguous)
    assert torch.equal(contiguous, out)


def test_negative_scale(simd):
    q, k, v, out = inputs((1, 2, 40, 300, 32), torch.float32)
    check(q, k, v, -0.3, False, out)


def test_logits_that_grow_from_key_to_key(simd):
    """The maximum changes with each block of keys."""
    q, k, v, out = inputs((1, 1, 40, 1000, 32), torch.float32)
    check(q.abs(), k.abs() * torch.linspace(0, 2, 1000)[:, None], v, 0.2, False, out)


def test_large_logits_choose_one_key(simd):
    """The softmax is taken about its maximum."""
    q, k, v, out = inputs((1, 1, 40, 40, 32), torch.float32)
    attention_(q, k, v, 1e4, False, out)
    expected = expected_of(q, k, v, 1e4)
    assert (out.double() - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.thinned
@pytest.mark.parametrize("size", [5e4, 1e8])
def test_logits_whose_products_round(size, simd):
    """The largest weight is 1, whatever rounding leaves of its logit."""
    q, k, v, out = inputs((1, 1, 40, 40, 64), torch.float32)
    attention_(q * size, k * size, v, 0.125, False, out)
    chosen = (q.double() @ k.double().mT).argmax(-1)[0, 0]
    torch.testing.assert_close(out[0, 0], v[0, 0, chosen], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "fast"), [(torch.float32, False), (torch.bfloat16, True)], ids=str)
def test_a_head_does_not_depend_on_the_others_or_the_threads(dtype, fast):
    q, k, v, out = inputs((5, 2, 149, 300, 48), dtype)
    for _ in every_variant():
        attention_(q, k, v, 0.2, fast, out)
        alone = torch.empty_like(out[3:4, 1:])
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            attention_(q[3:4, 1:], k[3:4, 1:], v[3:4, 1:], 0.2, fast, alone)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(alone, out[3:4, 1:])


def test_nan_and_infinity_stay_in_their_rows_and_columns(simd):
    q, k, v, out = inputs((1, 2, 49, 77, 48), torch.float32)
    q[0, 0, 5] = torch.nan
    v[0, 1, :, 7] = torch.nan
    v[0, 1, 3, 9] = torch.inf
    attention_(q, k, v, 0.2, False, out)
    spoiled = torch.zeros(1, 2, 49, 48, dtype=torch.bool)
    spoiled[0, 0, 5] = spoiled[0, 1, :, 7] = True
    assert torch.equal(out.isnan() & ~spoiled, out.isnan() & (torch.arange(48) == 9) & ~spoiled)
    assert out[spoiled].isnan().all()
    assert not out[0, 1, :, 9].isfinite().any()


def test_recorded_calls_read_the_present_numbers(simd):
    q, k, v, out = inputs((2, 2, 40, 77, 40), torch.float32)
    with recording() as calls:
        attention_(q, k, v, 0.2, False, out)
    assert len(calls) == 1
    assert out.isnan().all()
    for number in (1.0, -0.5):
        v.mul_(number)
        calls.run()
        expected = expected_of(q, k, v, 0.2)
        assert (out.double() - expected).abs().max() <= 2 * EXACT * expected.abs().max()


def test_empty(simd):
    for shape in ((0, 2, 5, 7, 8), (2, 0, 5, 7, 8), (2, 2, 0, 7, 8)):
        attention_(*inputs(shape, torch.float32)[:3], 1.0, False, inputs(shape, torch.float32)[3])


def test_what_is_refused():
    q, k, v, out = inputs((1, 1, 8, 6, 8), torch.float32)
    with pytest.raises(RuntimeError, match=r"k must be \[B, H, T, D\]"):
        attention_(q, k[..., :4], v, 1.0, False, out)
    with pytest.raises(RuntimeError, match=r"v must be \[B, H, T, D\]"):
        attention_(q, k, v[:, :, :5], 1.0, False, out)
    with pytest.raises(RuntimeError, match="k must have at least one position"):
        attention_(q, k[:, :, :0], v[:, :, :0], 1.0, False, out)
    with pytest.raises(RuntimeError, match="out must be"):
        attention_(q, k, v, 1.0, False, out[:, :, :5])
    with pytest.raises(RuntimeError, match="k must have a contiguous last dimension"):
        attention_(q, k.mT.contiguous().mT, v, 1.0, False, out)
    with pytest.raises(RuntimeError, match="must be float32, bfloat16 or float16"):
        attention_(*(t.double() for t in (q, k, v)), 1.0, False, out.double())


@requires_amx
def test_fast_multiplies_bfloat16_by_amx():
    """Also for float32 tensors."""
    q, k, v, out = inputs((1, 1, 64, 64, 32), torch.float32)
    attention_(q, k, v, 0.2, True, out)
    assert (out.double() - expected_of(q, k, v, 0.2)).abs().max() > 1e-4


def test_opcheck():
    q, k, v, out = inputs((1, 2, 9, 9, 16), torch.float32)
    torch.library.opcheck(attention_.default, (q, k, v, 0.25, False, out))


@pytest.mark.parametrize("at", [0, 300, 4095])
@pytest.mark.parametrize("gap", [10.0, 16.7, 20.0])
def test_one_key_above_many(gap, at, simd):
    """The weights far below the largest one count together: here they are all of the output but ones."""
    q, k = torch.ones(1, 1, 33, 16), torch.zeros(1, 1, 4096, 16)
    k[..., at, :] = gap / 16
    v = torch.ones(1, 1, 4096, 16)
    v[..., at, ::2] = 0
    out = torch.empty_like(q)
    attention_(q, k, v, 1.0, False, out)
    expected = expected_of(q, k, v, 1.0)
    assert (out[..., 1::2] - 1).abs().max() <= EXACT
    assert ((out - expected) / expected).abs().max() <= 1e-4
