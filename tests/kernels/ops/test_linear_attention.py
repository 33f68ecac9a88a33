"""linear_attention_: against float64 by the rule of every op, over layouts, widths and instruction sets."""

import pytest
import torch
from torch import Tensor

from diffusion.kernels._recorded_calls import recording
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.linear_attention.library import linear_attention_
from helpers.native import every_variant, requires_native

pytestmark = requires_native
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# images, heads, channels of keys and of values, positions, tokens of memory
SHAPES = [(1, 4, 32, 32, 300, 4), (2, 3, 20, 7, 65, 0), (3, 1, 1, 5, 1, 2), (1, 2, 40, 48, 2500, 1)]


def heads(n: int, count: int, channels: int, positions: int, dtype: torch.dtype) -> Tensor:
    """[n, heads, channels, positions], a range of the channels of a map in channels_last."""
    rows = torch.randn(n, positions, count * channels + 3) * 2
    return rows.to(dtype)[..., 2:-1].unflatten(-1, (count, channels)).permute(0, 2, 3, 1)


def arguments(shape, dtype, seed: int = 0):
    torch.manual_seed(seed)
    n, count, keys, values, positions, tokens = shape
    q, k = (heads(n, count, keys, positions, dtype) for _ in range(2))
    memory = (
        (torch.randn(count, keys, tokens), torch.randn(count, values, tokens)) if tokens else (None, None)
    )
    return q, k, heads(n, count, values, positions, dtype), *memory


def formula(dtype, q, k, v, memory_k, memory_v, scale):
    q, k, v = (t.to(dtype) for t in (q, k, v))
    if memory_k is not None:
        k, v = (
            torch.cat([m.to(dtype).expand(len(q), -1, -1, -1), t], dim=-1)
            for m, t in ((memory_k, k), (memory_v, v))
        )
    summary = k.softmax(dim=-1) @ v.mT
    return summary.mT @ (q.softmax(dim=-2) * scale)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape, dtype, simd):
    given = arguments(shape, dtype)
    n, count, _, values, positions, _ = shape
    out = heads(n, count, values, positions, dtype)
    linear_attention_(*given, 0.3, out)
    assert wrong(out, formula(dtype, *given, 0.3), formula(torch.float64, *given, 0.3)) is None


@pytest.mark.parametrize("offset", [80.0, -300.0])
def test_large_keys_and_queries(offset, simd):
    """The exponentials of a softmax are of differences."""
    q, k, v, *memory = arguments(SHAPES[0], torch.float32)
    q, k, out = q + offset, k * 10 - offset, torch.empty_like(v)
    linear_attention_(q, k, v, *memory, 1.0, out)
    given = (q, k, v, *memory, 1.0)
    assert wrong(out, formula(torch.float32, *given), formula(torch.float64, *given)) is None


def test_an_image_does_not_depend_on_the_others_or_the_threads():
    given = arguments((3, 2, 32, 16, 2100, 4), torch.float32)
    out = torch.empty_like(given[2])
    for variant in every_variant():
        linear_attention_(*given, 1.0, out)
        for i in range(3):
            q, k, v = (t[i : i + 1] for t in given[:3])
            alone = torch.empty_like(v)
            linear_attention_(q, k, v, *given[3:], 1.0, alone)
            assert torch.equal(out[i : i + 1], alone), variant


def test_recorded_calls_read_what_is_there_then():
    q, k, v, *memory = arguments(SHAPES[0], torch.float32)
    out = torch.zeros_like(v)
    with recording() as recorded:
        linear_attention_(q, k, v, *memory, 1.0, out)
    assert not out.any()
    k.add_(torch.randn(k.shape))
    recorded.run()
    torch.testing.assert_close(out, formula(torch.float32, q, k, v, *memory, 1.0))


def test_nan_stays_in_its_head():
    q, k, v, *memory = arguments(SHAPES[0], torch.float32)
    out = torch.empty_like(v)
    q[0, 1, 3, 5] = k[0, 2, 4, 6] = float("nan")
    linear_attention_(q, k, v, *memory, 1.0, out)
    assert out[0, 1, :, 5].isnan().all()
    assert out[0, 2].isnan().all()
    assert out.isnan().sum() == 32 * (1 + 300)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 4, 32, 300).double()}, "q must be float32"),
        ({"k": torch.zeros(1, 4, 32, 299)}, "must be .N, heads, channels, positions"),
        ({"v": torch.zeros(1, 4, 32, 300)}, "v must have neighbouring channels"),
        ({"memory_k": None}, "memory_k and memory_v go together"),
        ({"memory_k": torch.zeros(4, 32, 5)}, "memory_v must be contiguous float32"),
        ({"memory_v": torch.zeros(4, 32, 4).half()}, "memory_v must be contiguous float32"),
    ],
)
def test_wrong_arguments(change, message):
    names = ("q", "k", "v", "memory_k", "memory_v")
    given = dict(zip(names, arguments(SHAPES[0], torch.float32), strict=True)) | change
    with pytest.raises(RuntimeError, match=message):
        linear_attention_(**given, scale=1.0, out=arguments(SHAPES[0], torch.float32)[2])


def test_empty_and_opcheck():
    empty = torch.zeros(0, 2, 3, 5).mT.contiguous().mT
    linear_attention_(empty, empty, empty, None, None, 1.0, empty)
    given = arguments(SHAPES[1], torch.float32)
    torch.library.opcheck(linear_attention_.default, (*given, 1.0, torch.empty_like(given[2])))


def test_keys_that_are_masked_out(simd):
    """-inf takes a position out; a run of them is longer than a kernel's rows and parts."""
    q, k, v, *memory = arguments(SHAPES[3], torch.float32)
    k[..., :1500] = -torch.inf
    out = torch.empty_like(v)
    linear_attention_(q, k, v, *memory, 0.3, out)
    expected = formula(torch.float64, q, k, v, *memory, 0.3)
    assert wrong(out, formula(torch.float32, q, k, v, *memory, 0.3), expected) is None
