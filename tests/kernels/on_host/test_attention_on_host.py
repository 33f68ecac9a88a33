"""The CUDA kernels of attention and of its gradient, built for the host, against the formula in float64."""

import math
import sys
from functools import partial

import pytest
import torch

from diffusion import kernels
from diffusion.kernels.ops.attention import library
from diffusion.kernels.ops.attention.cases import CASES, Case
from diffusion.kernels.ops.attention.native import WGMMA_QUERIES, key_parts
from helpers.attention import DTYPES, formula, torch_ops, upstream, with_gradients
from helpers.cuda_on_host import launches, load, on_host, requires_compiler  # noqa: F401
from helpers.paths import ROOT
from helpers.tolerance import assert_close

sys.path.append(str(ROOT))  # last, so that the package is the one that is installed

from benchmarks.gpu import sanitized

# Compiling these kernels takes long; by default those of test_cuda_on_host.py are compiled.
pytestmark = [requires_compiler, pytest.mark.exhaustive, pytest.mark.usefixtures("on_host")]
ON_HOST = ("attention",)

library.operator.define("on_host_attention")
library.operator.define("on_host_attention_wgmma")
OPS = torch.ops.fused_diffusion

SMALL = [
    "scaled", "peaked", "extreme", "reversed", "uniform", "misaligned", "odd_misaligned", "one_column",
    "one_position", "odd", "empty_batch",
]  # fmt: skip
TILES = {  # in every padded width, with ends inside of a tile and tiles that are full
    "one_tile": Case(2, 1, 49, 64, packed=True),
    "one_query_more": Case(1, 1, 65, 40, packed=True),
    "three_tiles": Case(1, 1, 130, 96, packed=True),
    "full_tiles": Case(1, 1, 128, 8),
    "widest": Case(1, 1, 130, 256, packed=True),
    "one_wide_position": Case(1, 2, 1, 256, packed=True),
    "wide_misaligned": Case(1, 2, 20, 130, packed=True, offset=1),
    "many_heads": Case(2, 5, 17, 16, packed=True),
}
ALL = {name: CASES[name] for name in SMALL} | TILES

# Enough multiprocessors that a block takes 16 queries and its warps divide the keys; so few that it takes 64.
PROCESSORS = {"few_queries": 1000, "many_queries": 1}


def attention(q, k, v, *, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return OPS.on_host_attention(q, k, v, scale)[0]


@pytest.fixture(params=PROCESSORS)
def blocks(request, on_host):  # noqa: F811
    on_host(PROCESSORS[request.param], 227 << 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL)
@pytest.mark.usefixtures("blocks")
def test_value(case, dtype):
    (q, k, v), kwargs = ALL[case].inputs(dtype)
    scale = kwargs["scale"] if kwargs["scale"] is not None else q.shape[-1] ** -0.5
    out, logsumexp = OPS.on_host_attention(q, k, v, scale)
    exact = [t.double() for t in (q, k, v)]
    assert_close(out, torch_ops(q, k, v, scale=scale), formula(*exact, scale=scale))
    logits, exact_logits = q.float() @ k.float().mT * scale, exact[0] @ exact[1].mT * scale
    assert_close(logsumexp, torch.logsumexp(logits, -1), torch.logsumexp(exact_logits, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "processors", "parts"),
    [
        (Case(1, 1, 256, 256, packed=True), 132, 4),  # DDPM's, alone
        (Case(1, 1, 256, 256, packed=True), 48, 2),
        (Case(1, 2, 200, 130, packed=True), 108, 4),  # the last part has 8 keys, all warps but one have none
        (Case(1, 1, 321, 250, packed=True, offset=1), 132, 6),  # the last part has one key
    ],
    ids=lambda value: "x".join(map(str, value[:4])) if isinstance(value, Case) else str(value),
)
def test_keys_in_parts(case, processors, parts, dtype, on_host):  # noqa: F811
    on_host(processors, 227 << 10)
    (q, k, v), _ = case.inputs(dtype)
    scale = 1.25
    out, logsumexp = OPS.on_host_attention(q, k, v, scale)
    blocks = case.batch * case.heads * math.ceil(case.positions / 16)
    assert launches("attention") == [(blocks, parts, 1), (math.ceil(q[..., 0].numel() / 4), 1, 1)]
    assert key_parts(q, processors) == parts
    exact = [t.double() for t in (q, k, v)]
    assert_close(out, torch_ops(q, k, v, scale=scale), formula(*exact, scale=scale))
    logits, exact_logits = q.float() @ k.float().mT * scale, exact[0] @ exact[1].mT * scale
    assert_close(logsumexp, torch.logsumexp(logits, -1), torch.logsumexp(exact_logits, -1))
    again = OPS.on_host_attention(q, k, v, scale)
    assert all(map(torch.equal, again, (out, logsumexp)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_of_which_a_query_leaves_out_all_keys(dtype, on_host):  # noqa: F811
    on_host(132, 227 << 10)
    (q, k, v), _ = Case(1, 1, 256, 256).inputs(dtype)
    q, k = q.abs() + 0.1, k.clone()
    k[:, :, 20:150] = -math.inf
    out = attention(q, k, v)
    assert launches("attention")[0] == (16, 4, 1)
    rest = [torch.cat([t[:, :, :20], t[:, :, 150:]], 2) for t in (k, v)]
    assert_close(out, torch_ops(q, *rest), formula(*(t.double() for t in (q, *rest))))


@pytest.mark.parametrize("processors", [1, 4, 17, 60, 108, 132, 1000])
@pytest.mark.parametrize("positions", [1, 64, 65, 300, 700])
def test_python_knows_the_parts(positions, processors, on_host):  # noqa: F811
    on_host(processors, 227 << 10)
    q = torch.zeros(1, 1, positions, 8)
    OPS.on_host_attention(q, q, q, 1.0)
    assert key_parts(q, processors) == launches("attention")[0][1]


WGMMA = {
    "ddpm": Case(1, 1, 256, 256, packed=True),
    "rounds_of_every_buffer": Case(1, 1, 520, 64, packed=True),
    "half_as_wide": Case(1, 1, 140, 128, packed=True),
    "one_query_more": Case(2, 3, 129, 64, packed=True),
    "columns_beyond_the_head": Case(1, 2, 130, 200, packed=True),
    "narrow": Case(2, 1, 17, 8),
    "one_wide_position": Case(1, 2, 1, 256, packed=True),
    "negative": Case(1, 1, 70, 72, scale=-0.3, packed=True),
    "wide_apart": Case(2, 2, 49, 64, std=30.0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", WGMMA)
def test_wgmma(case, dtype):
    """Descriptors, swizzles and barriers are emulated from their bits, so a wrong one gives other numbers."""
    (q, k, v), kwargs = WGMMA[case].inputs(dtype)
    scale = kwargs["scale"] if kwargs["scale"] is not None else q.shape[-1] ** -0.5
    out, logsumexp = OPS.on_host_attention_wgmma(q, k, v, scale)
    blocks = q.shape[0] * q.shape[1] * math.ceil(q.shape[2] / WGMMA_QUERIES)
    assert launches("attention") == [(blocks, 1, 1)]
    exact = [t.double() for t in (q, k, v)]
    assert_close(out, torch_ops(q, k, v, scale=scale), formula(*exact, scale=scale))
    logits, exact_logits = q.float() @ k.float().mT * scale, exact[0] @ exact[1].mT * scale
    assert_close(logsumexp, torch.logsumexp(logits, -1), torch.logsumexp(exact_logits, -1))


def test_wgmma_with_infinite_and_undefined_numbers():
    (q, k, v), _ = Case(1, 1, 200, 64).inputs(torch.bfloat16)
    bad = q.clone()
    bad[0, 0, 150, 2] = math.nan
    out = OPS.on_host_attention_wgmma(bad, k, v, 0.125)[0]
    assert out.isnan().any(-1).nonzero().tolist() == [[0, 0, 150]]
    q, k = q.abs() + 0.1, k.clone()
    k[:, :, 20:150] = -math.inf  # all of a tile
    out = OPS.on_host_attention_wgmma(q, k, v, 0.125)[0]
    rest = [torch.cat([t[:, :, :20], t[:, :, 150:]], 2) for t in (k, v)]
    assert_close(
        out, torch_ops(q, *rest, scale=0.125), formula(*(t.double() for t in (q, *rest)), scale=0.125)
    )


@pytest.mark.parametrize(
    ("case", "dtype", "capability"),
    [
        (Case(1, 1, 33, 64, offset=1), torch.bfloat16, 90),
        (Case(1, 1, 33, 60), torch.bfloat16, 90),
        (Case(1, 1, 33, 64), torch.float32, 90),
        (Case(1, 1, 33, 64), torch.bfloat16, 100),
        (Case(1, 1, 33, 64), torch.bfloat16, 80),
    ],
    ids=["misaligned", "width", "float32", "newer", "older"],
)
def test_the_other_kernel_takes_what_wgmma_cannot(case, dtype, capability, on_host):  # noqa: F811
    load("attention").on_host_capability(capability)
    (q, k, v), _ = case.inputs(dtype)
    try:
        results = OPS.on_host_attention_wgmma(q, k, v, 0.3)
        assert launches("attention") == [(math.ceil(33 / 16), 1, 1)]
    finally:
        load("attention").on_host_capability(90)
    assert all(map(torch.equal, results, OPS.on_host_attention(q, k, v, 0.3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL)
def test_gradient(case, dtype):
    """Against PyTorch's fused op, whose gradient starts from the rounded output too."""
    args, kwargs = ALL[case].inputs(dtype)
    actual = with_gradients(partial(attention, **kwargs), args)
    peer = with_gradients(partial(kernels.attention, backend="reference", **kwargs), args)
    expected = with_gradients(partial(formula, **kwargs), args, torch.float64)
    for one, other, truth in zip(actual[1:], peer[1:], expected[1:], strict=True):
        assert one.dtype == dtype
        assert_close(one, other, truth)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_read_through_their_strides(dtype):
    """Slices with gaps, one key for every position, one value for every head, and the gradient of a sum."""
    (q, k, v), _ = Case(4, 2, 35, 24, packed=True).inputs(dtype)
    k, v = k[1::2, :, 7:8].expand(-1, -1, 12, -1), v[1::2, :1, ::3].expand(-1, 2, -1, -1)
    views = [q[1::2, :, ::3], k, v]

    def results(args):
        leaves = [t.detach().requires_grad_() for t in args]
        out = attention(*leaves)
        return out, *torch.autograd.grad(out.sum(), leaves)

    assert all(map(torch.equal, results(views), results([t.contiguous() for t in views])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("blocks")
class TestMeaning:
    CASE = Case(2, 2, 40, 16, packed=True)

    def test_merging_the_heads_copies_nothing(self, dtype):
        out = attention(*self.CASE.inputs(dtype)[0])
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()

    def test_an_image_does_not_depend_on_its_batch(self, dtype):
        args, _ = self.CASE.inputs(dtype)
        batch = with_gradients(attention, args)
        alone = [attention(*(t[i : i + 1] for t in args)) for i in range(2)]
        assert torch.equal(torch.cat(alone), batch[0])

    def test_nan_stays_with_its_query(self, dtype):
        q, k, v = self.CASE.inputs(dtype)[0]
        q[1, 1, 5, 2] = math.nan
        assert attention(q, k, v).isnan().any(-1).nonzero().tolist() == [[1, 1, 5]]

    def test_nan_in_a_key_reaches_every_query(self, dtype):
        q, k, v = self.CASE.inputs(dtype)[0]
        k[1, 1, 39, 2] = math.nan
        assert attention(q, k, v).isnan().any(-1).nonzero().tolist() == [[1, 1, i] for i in range(40)]

    def test_a_key_of_minus_infinity_is_left_out(self, dtype):
        (q, k, v), _ = Case(1, 1, 70, 16).inputs(dtype)
        q, k = q.abs() + 0.1, k.clone()
        k[:, :, 20:] = -math.inf
        out = attention(q, k, v)
        rest = formula(*(t.double() for t in (q, k[:, :, :20], v[:, :, :20])))
        assert_close(out, torch_ops(q, k[:, :, :20], v[:, :, :20]), rest)

    def test_logits_may_all_be_far_below_zero(self, dtype):
        """Keys beyond the end must not count: they would outweigh all others."""
        (q, k, v), _ = Case(1, 1, 70, 16).inputs(dtype)
        args = q.abs() + 3, -k.abs() - 3, v
        actual = with_gradients(partial(attention, scale=1.0), args)
        peer = (
            torch_ops(*args, scale=1.0),
            *with_gradients(partial(kernels.attention, backend="reference", scale=1.0), args)[1:],
        )
        expected = with_gradients(partial(formula, scale=1.0), args, torch.float64)
        for one, other, truth in zip(actual, peer, expected, strict=True):
            assert_close(one, other, truth)


@pytest.mark.usefixtures("blocks")
def test_positions_beyond_two_billion_numbers(monkeypatch):
    """Two positions 2**31 numbers apart, in memory that is only touched there."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = memory.as_strided((1, 1, 2, 8), (0, 0, 2**31, 1))
    near = torch.linspace(-2, 2, 16).to(torch.bfloat16).reshape(1, 1, 2, 8)
    far.copy_(near)
    results = [with_gradients(lambda q: attention(q, q, q), [t]) for t in (far, near)]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    leaves = [t.detach().requires_grad_() for t in CASES["odd_misaligned"].inputs(dtype)[0]]
    torch.library.opcheck(OPS.on_host_attention.default, (*leaves, 0.3))
    q, k, v = (t.detach() for t in leaves)
    out, logsumexp = OPS.on_host_attention(q, k, v, 0.3)
    arguments = (upstream(out), q, k, v, out, logsumexp, 0.3)
    torch.library.opcheck(OPS.on_host_attention_backward.default, arguments)


def test_the_sanitizer_sees_every_kernel(on_host):  # noqa: F811
    """Blocks of 64 and of 16 queries, and keys in parts; by wgmma, more tiles than there are buffers."""
    grids = []
    for shape in sanitized.ATTENTION:
        on_host(132, 227 << 10)
        attention(*Case(*shape).inputs(torch.bfloat16)[0])
        grids.append(launches("attention"))
    assert [(140, 1, 1)] in grids
    assert [(3 * 2, 1, 1)] in grids
    assert [len(launched) for launched in grids].count(2) == 1
    for _, _, positions, width in sanitized.WGMMA[1:]:
        assert 2 * math.ceil(positions / (64 if width == 256 else 128)) > 4


def test_a_head_may_be_too_wide():
    x = torch.zeros(1, 1, 2, 257)
    with pytest.raises(RuntimeError, match="the width of a head is 257, more than 256"):
        attention(x, x, x)
