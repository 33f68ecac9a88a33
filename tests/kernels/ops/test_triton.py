"""The Triton backends of group_norm_silu and attention against float64: on a GPU, or in the interpreter.

test_triton_interpreter.py runs this file with TRITON_INTERPRET=1 where there is no GPU. The tests of philox
and reverse_step take "triton" among their backends.
"""

import math

import pytest
import torch

from diffusion.kernels import _triton, attention, group_norm_silu, philox_normal
from diffusion.kernels.ops.attention import cases as attention_cases
from diffusion.kernels.ops.attention import triton_launch as attention_impl
from diffusion.kernels.ops.group_norm_silu import cases as norm_cases
from diffusion.kernels.ops.group_norm_silu import triton_launch as norm_impl
from helpers.thinning import exhaustive_but
from helpers.tolerance import assert_close

DEVICE = "cpu" if _triton.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(
    _triton.MISSING is not None or not (_triton.INTERPRETED or torch.cuda.is_available()),
    reason="no GPU, and TRITON_INTERPRET=1 is not set",
)

AttentionCase, NormCase = attention_cases.Case, norm_cases.Case
LARGE = {"mnist", "mnist_channels_last", "cifar10", "cifar10_coarse", "adm", "adm_channels_last"}
NORM_CASES = {name: case for name, case in norm_cases.CASES.items() if name not in LARGE} | {
    "mnist": NormCase((2, 32, 28, 28), 32, add=True, channels_last=True),
    "sixes": NormCase((1, 192, 4, 4), 32, scale_shift=True, channels_last=True),
    "eighteens": NormCase((1, 72, 6, 5), 4, scale_shift=True, channels_last=True),
    "wide_group": NormCase((1, 1500, 2, 3), 1),
    "last_block_of_channels": NormCase((1, 44, 3, 3), 11, channels_last=True),
    # The groups of the cases that take long in the interpreter, but few of them.
    "improved_groups": NormCase((1, 72, 8, 8), 4, add=True),
    "adm_wide_groups": NormCase((1, 256, 4, 4), 4, scale_shift=True),
    "adm_wide_groups_channels_last": NormCase((1, 256, 4, 4), 4, scale_shift=True, channels_last=True),
    "attention_norm_groups": NormCase((1, 24, 8, 8), 4, activation="none"),
    "off_centre_groups": NormCase((1, 16, 16, 16), 2, mean=1e3),
    "off_centre_groups_channels_last": NormCase((1, 16, 16, 16), 2, mean=1e3, channels_last=True),
    "large_groups": NormCase((1, 16, 16, 16), 2, std=1e3),
}
# In tiles so small that the reduction is split.
SPLIT_CASES = {
    "contiguous": NormCase((2, 6, 19, 7), 2, add=True, scale_shift=True),
    "channels_last": NormCase((1, 24, 13, 8), 6, add=True, scale_shift=True, channels_last=True),
    "off_centre": NormCase((1, 8, 16, 16), 2, mean=1e3),
    "off_centre_channels_last": NormCase((1, 16, 16, 16), 2, mean=1e3, add=True, channels_last=True),
    "no_affine": NormCase((1, 3, 200), 1, affine=False, activation="none"),
}
ATTENTION_CASES = {
    name: case
    for name, case in attention_cases.CASES.items()
    if name not in LARGE | {"mnist_coarse", "contiguous"} and case.width <= 256
} | {
    "packed": AttentionCase(2, 2, 40, 24, packed=True),
    "whole_tiles": AttentionCase(1, 1, 64, 64, packed=True),
    "width_256": AttentionCase(1, 1, 48, 256, packed=True),
    "negative_scale": AttentionCase(1, 2, 37, 16, scale=-3.0, std=8.0),
    "two_steps": AttentionCase(1, 1, 130, 100),
}


def values_and_gradients(op, args, kwargs, dtype, **options):
    """The output, then the gradient of each floating-point tensor, in `dtype`."""

    def leaf(t):
        return t.detach().to(dtype).requires_grad_() if isinstance(t, torch.Tensor) else t

    args, kwargs = tuple(map(leaf, args)), {name: leaf(t) for name, t in kwargs.items()}
    output = op(*args, **kwargs, **options)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, dtype=torch.float64, generator=generator).half()  # exact in every dtype
    grad = grad.to(torch.bfloat16).to(output)
    leaves = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def check(op, args, kwargs, dtype):
    actual = values_and_gradients(op, args, kwargs, dtype, backend="triton")
    peer = values_and_gradients(op, args, kwargs, dtype, backend="reference")
    expected = values_and_gradients(op, args, kwargs, torch.float64, backend="reference")
    assert actual[0].dtype == dtype
    for one, other, truth in zip(actual, peer, expected, strict=True):
        assert_close(one, other, truth)
    return actual


def work(case):
    """Elements of a norm, logits of attention."""
    if isinstance(case, NormCase):
        return math.prod(case.shape)
    return case.batch * case.heads * case.positions**2


def parameters(cases, limit):
    """Names of cases. By default a GPU runs them all, the interpreter those of no more work than `limit`."""
    default = [name for name, case in cases.items() if not _triton.INTERPRETED or work(case) <= limit]
    return exhaustive_but(cases, default)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", parameters(NORM_CASES, 16_000))
def test_norm(case, dtype):
    args, kwargs = NORM_CASES[case].inputs(dtype, DEVICE)
    output, dx, *_ = check(group_norm_silu, args, kwargs, dtype)
    for tensor in (output, dx):
        assert tensor.stride() == torch.empty_like(args[0]).stride()


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(norm_impl, "MAX_TILE", {"forward": 64, "backward": 64})
    monkeypatch.setattr(norm_impl, "SPLIT_TILE", 256)
    monkeypatch.setattr(norm_impl, "MAX_CHUNKS", 8)
    monkeypatch.setattr(norm_impl, "PARTIAL_TILE", 64)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", parameters(SPLIT_CASES, 3_000))
def test_norm_with_a_split_reduction(case, dtype, small_tiles):
    (x, groups, *_), _ = SPLIT_CASES[case].inputs()
    sizes = (*x.flatten(2).shape, groups, SPLIT_CASES[case].channels_last)
    assert all(norm_impl.tilings(*sizes, direction)[0].chunk > 0 for direction in norm_impl.MAX_TILE)
    args, kwargs = SPLIT_CASES[case].inputs(dtype, DEVICE)
    check(group_norm_silu, args, kwargs, dtype)


@pytest.mark.thinned
@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_norm_with_every_tiling(channels_last, index, monkeypatch):
    monkeypatch.setattr(_triton, "fastest", lambda *args: args[2][min(index, len(args[2]) - 1)])
    monkeypatch.setattr(norm_impl, "MIN_PROGRAMS", 4096)
    case = NormCase((1, 64, 16, 16), 16, add=True, scale_shift=True, channels_last=channels_last)
    args, kwargs = case.inputs(torch.bfloat16, DEVICE)
    check(group_norm_silu, args, kwargs, torch.bfloat16)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_norm_has_no_gradient_of_what_is_added_to_a_channel_alone_in_its_group(split, request):
    if split:
        request.getfixturevalue("small_tiles")
    for channels_last in (False, True):
        case = NormCase((1, 6, 19, 7), 6, add=True, scale_shift=True, channels_last=channels_last, mean=3.0)
        args, kwargs = case.inputs(device=DEVICE)
        *_, add, _, _ = values_and_gradients(group_norm_silu, args, kwargs, torch.float32, backend="triton")
        assert not add.any()


def test_norm_of_slices_and_mixed_dtypes():
    """Sliced channels, rows and batches at odd offsets; halves of one embedding; parameters in float32."""
    x = torch.randn(3, 12, 10, 9, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    scale, shift = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE).chunk(2, 1)
    weight = torch.randn(8, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    wide = x.contiguous(memory_format=torch.channels_last)
    for view in (x[1:, 3:11], wide[:2, 1:9], x[::2, 4:, ::3], x[:2, :8, 1:, 1:], wide[:2, :8, :, 2:]):
        options = dict(scale=scale[: len(view)], shift=shift[: len(view)])
        y = group_norm_silu(view, 4, weight, backend="triton", **options)
        exact = {name: t.double() for name, t in options.items()}
        expected = group_norm_silu(view.double(), 4, weight.double(), backend="reference", **exact)
        peer = group_norm_silu(view, 4, weight, backend="reference", **options)
        assert y.dtype == torch.bfloat16
        assert_close(y, peer, expected)


def test_norm_runs_twice_alike():
    args, kwargs = NORM_CASES["sixes"].inputs(torch.bfloat16, DEVICE)
    first, second = (
        values_and_gradients(group_norm_silu, args, kwargs, torch.bfloat16, backend="triton")
        for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", parameters(ATTENTION_CASES, 15_000))
def test_attention(case, dtype):
    args, kwargs = ATTENTION_CASES[case].inputs(dtype, DEVICE)
    check(attention, args, kwargs, dtype)


def test_attention_reads_strided_heads_and_writes_them_merged():
    qkv = torch.randn(2, 20, 3, 2, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    q, k, v = qkv[:, 2:19].permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(q, k, v, backend="triton")
    torch.testing.assert_close(out, attention(q, k, v, backend="reference"), rtol=1e-5, atol=1e-5)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.thinned
@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_with_every_tiling(dtype, index, monkeypatch):
    tables = {name: table[dtype.itemsize, 64] for name, table in attention_impl._TILINGS.items()}

    def choose(op, *_):
        table = tables[op.split()[1]]
        return table[min(index, len(table) - 1)]

    monkeypatch.setattr(_triton, "fastest", choose)
    args, kwargs = AttentionCase(1, 1, 140, 20, packed=True).inputs(dtype, DEVICE)
    check(attention, args, kwargs, dtype)


def test_logsumexp():
    (q, k, v), _ = AttentionCase(2, 2, 33, 8).inputs(device=DEVICE)
    _, logsumexp = torch.ops.fused_diffusion.attention_triton(q, k, v, 0.5)
    expected = torch.logsumexp(0.5 * q.double() @ k.double().mT, -1)
    torch.testing.assert_close(logsumexp.double(), expected, rtol=1e-6, atol=1e-6)


def test_declined_with_a_reason():
    x, q = torch.zeros(1, 8, 4, device=DEVICE), torch.zeros(1, 1, 4, 512, device=DEVICE)
    for call, reason in (
        (lambda: group_norm_silu(x.double(), 2, backend="triton"), "x is torch.float64"),
        (lambda: group_norm_silu(x.new_zeros(1, 8192), 1, backend="triton"), "8192 channels, more than 4096"),
        (lambda: attention(q, q, q, backend="triton"), "width of a head is 512, more than 256"),
        (lambda: attention(q[..., ::2], q[..., ::2], q[..., ::2], backend="triton"), "q is not contiguous"),
        (lambda: attention(*[q[..., :8].double()] * 3, backend="triton"), "q is torch.float64"),
    ):
        with pytest.raises(ValueError, match=reason):
            call()


OPCHECKED = {name: NORM_CASES[name] for name in ("vectors", "empty_batch")} | {
    "no_affine": NormCase((1, 4, 3, 5), 2, add=True, scale_shift=True, affine=False),
}


@pytest.mark.parametrize("case", OPCHECKED)
def test_opcheck_norm(case):
    (x, groups, weight, bias), kwargs = OPCHECKED[case].inputs(device=DEVICE)
    add, scale, shift = (kwargs.get(name) for name in ("add", "scale", "shift"))
    for tensor in (x, weight, bias, add, scale, shift):
        if tensor is not None:
            tensor.requires_grad_()
    arguments = (x, groups, weight, bias, 1e-5, add, scale, shift, kwargs["activation"] == "silu")
    torch.library.opcheck(torch.ops.fused_diffusion.group_norm_silu_triton.default, arguments)


@pytest.mark.parametrize("case", ["odd", "one_position"])
def test_opcheck_attention(case):
    qkv, _ = ATTENTION_CASES[case].inputs(device=DEVICE)
    arguments = (*(t.requires_grad_() for t in qkv), 0.5)
    torch.library.opcheck(torch.ops.fused_diffusion.attention_triton.default, arguments)


def test_opcheck_philox():
    ids = torch.tensor([3, 2**40], device=DEVICE)
    torch.library.opcheck(torch.ops.fused_diffusion.philox_normal_triton.default, (ids, -5, 7, 30))


def test_opcheck_reverse_step():
    x, out = torch.randn(2, 3, 4, 4, device=DEVICE), torch.randn(2, 3, 4, 4, device=DEVICE)
    row = [0.0, 1.0, 1.0, -0.5, 1.0, 0.9, 0.1, 0.0, 0.0, 0.1, 0.0, 0.0]
    table = torch.tensor([row], dtype=torch.float64, device=DEVICE)
    counter, ids = torch.tensor([0, 1, 2, 0], device=DEVICE), torch.arange(2, device=DEVICE)
    ops = torch.ops.fused_diffusion
    torch.library.opcheck(ops.reverse_step_triton.default, (x, out, None, None, None, table, counter, ids))
    arguments = (x, out, out, x.clone(), None, table, counter, ids, torch.zeros_like(torch.cat([x, x])))
    torch.library.opcheck(ops.reverse_step_triton_.default, arguments)


def test_compiles_into_one_graph_with_gradients():
    def block(x, weight, q):
        h = group_norm_silu(x, 2, weight, backend="triton")
        h = h * philox_normal(h.shape, seed=1, device=DEVICE, backend="triton")
        return h.sum() + attention(q, q, q, backend="triton").square().sum()

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator).to(DEVICE) for s in ((2, 4, 3, 3), (4,), (1, 2, 9, 8))]
    inputs = [t.requires_grad_() for t in inputs]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(block(*inputs), inputs)
    for one, other in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.skipif(_triton.INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_more_than_int32_elements(channels_last):
    """The last sample of 2^31 + elements, in bfloat16: 4 GiB, and as much for the output."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free memory")
    x = torch.empty(2**17 + 1, 16, 32, 32, dtype=torch.bfloat16, device="cuda")
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x[-1] = torch.randn(16, 32, 32, device="cuda")
    y = group_norm_silu(x, 4, backend="triton")
    expected = group_norm_silu(x[-1:], 4, backend="reference")
    torch.testing.assert_close(y[-1:], expected, rtol=0.02, atol=0.02)


@pytest.mark.skipif(_triton.INTERPRETED, reason="needs a GPU")
def test_a_captured_graph_replays():
    args, kwargs = NormCase((2, 32, 16, 16), 8).inputs(torch.bfloat16, "cuda")
    (q, k, v), _ = AttentionCase(1, 1, 64, 64, packed=True).inputs(torch.bfloat16, "cuda")

    def both():
        return (
            group_norm_silu(*args, **kwargs, backend="triton"),
            attention(q, k, v, backend="triton"),
            philox_normal((3, 100), seed=2, sample_ids=ids, device="cuda", backend="triton"),
        )

    ids = torch.arange(3, device="cuda")
    expected = [t.clone() for t in both()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for t in captured:
        t.fill_(math.nan)
    graph.replay()
    assert all(map(torch.equal, captured, expected))
