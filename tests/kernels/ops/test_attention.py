"""attention and its gradient against the formula in float64, on every backend."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusion.kernels import _native, attention, explain
from diffusion.kernels.ops.attention import native, op
from diffusion.kernels.ops.attention.arguments import Arguments
from diffusion.kernels.ops.attention.cases import CASES
from helpers.attention import DTYPES, formula, torch_ops, upstream, with_gradients
from helpers.native import every_variant, requires_native
from helpers.tolerance import assert_close

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def serving(device):
    args, kwargs = CASES["mnist_coarse"].inputs(device=device)
    return op.serving(Arguments(*args, **kwargs))


BACKENDS = [(backend, device) for device in DEVICES for backend in serving(device)]
ON_CPU = serving("cpu")


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_value_and_gradient(backend, device, case, dtype):
    args, kwargs = CASES[case].inputs(dtype, device)
    actual = with_gradients(lambda *a: attention(*a, backend=backend, **kwargs), args)
    peer = with_gradients(lambda *a: torch_ops(*a, **kwargs), args)
    if backend != "cpp":  # the gradient of PyTorch's fused op, like theirs, starts from the rounded output
        peer = peer[0], *with_gradients(lambda *a: attention(*a, backend="reference", **kwargs), args)[1:]
    expected = with_gradients(lambda *a: formula(*a, **kwargs), args, torch.float64)
    for one, other, truth in zip(actual, peer, expected, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, truth)
    without = attention(*args, backend=backend, **kwargs)
    assert torch.equal(without, actual[0])


@pytest.mark.parametrize("case", ["mnist_coarse", "peaked", "odd", "one_position", "empty_batch"])
def test_reference_in_float64(case):
    args, kwargs = CASES[case].inputs(torch.float64)
    assert_close(attention(*args, **kwargs), None, formula(*args, **kwargs))


@pytest.mark.parametrize("case", ["one_position", "odd"])
def test_reference_gradient(case):
    args, kwargs = CASES[case].inputs(torch.float64)
    args = [t.detach().requires_grad_() for t in args]
    assert torch.autograd.gradcheck(lambda *a: attention(*a, **kwargs), args, fast_mode=True)


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["mnist_coarse", "many_tiles", "odd_misaligned", "reversed", "one_column"])
def test_instruction_sets_and_threads(case, dtype):
    """The same bits from all; but products of pairs and of tiles in bfloat16 are rounded otherwise."""
    args, kwargs = CASES[case].inputs(dtype)
    peer = with_gradients(lambda *a: torch_ops(*a, **kwargs), args)
    expected = with_gradients(lambda *a: formula(*a, **kwargs), args, torch.float64)
    seen = {}
    for variant in every_variant():
        actual = with_gradients(lambda *a: attention(*a, backend="cpp", **kwargs), args)
        simd = variant.partition(",")[0]
        own = dtype == torch.bfloat16 and simd in ("avx512_bf16", "amx")
        assert all(map(torch.equal, actual, seen.setdefault(simd if own else "", actual))), variant
        for one, other, truth in zip(actual, peer, expected, strict=True):
            assert_close(one, other, truth)


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["cifar10", "many_tiles", "peaked", "one_position"])
def test_logsumexp(case, dtype):
    (q, k, v), kwargs = CASES[case].inputs(dtype)
    scale = kwargs["scale"] or q.shape[-1] ** -0.5
    _, logsumexp = torch.ops.fused_diffusion.attention(q, k, v, scale)
    peer = torch.logsumexp(q.float() @ k.float().mT * scale, -1)
    assert_close(logsumexp, peer, torch.logsumexp(q.double() @ k.double().mT * scale, -1))


@requires_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scratch_is_written_before_it_is_read(dtype):
    """NaN from a call before, of a larger shape, does not come back."""
    args, kwargs = CASES["odd"].inputs(dtype)
    expected = with_gradients(lambda *a: attention(*a, backend="cpp", **kwargs), args)
    poison = [torch.full((1, 1, 300, 64), math.nan, dtype=dtype) for _ in range(3)]
    for _ in every_variant():
        with_gradients(lambda *a: attention(*a, backend="cpp"), poison)
    actual = with_gradients(lambda *a: attention(*a, backend="cpp", **kwargs), args)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ON_CPU)
class TestMeaning:
    def test_merging_the_heads_copies_nothing(self, backend, dtype):
        args, kwargs = CASES["mnist_coarse"].inputs(dtype)
        out = attention(*args, backend=backend, **kwargs)
        assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()

    def test_an_image_does_not_depend_on_its_batch(self, backend, dtype):
        args, kwargs = CASES["mnist_coarse"].inputs(dtype)
        args = [t[:3, :2] for t in args]
        batch = with_gradients(lambda *a: attention(*a, backend=backend, **kwargs), args)[0]
        for i in range(3):
            alone = attention(*(t[i : i + 1] for t in args), backend=backend, **kwargs)
            assert torch.equal(alone[0], batch[i])

    def test_inputs_are_left_alone(self, backend, dtype):
        args, kwargs = CASES["odd"].inputs(dtype)
        before = [t.clone() for t in args]
        with_gradients(lambda *a: attention(*a, backend=backend, **kwargs), args)
        assert all(map(torch.equal, args, before))

    def test_nan_stays_with_its_query(self, backend, dtype):
        (q, k, v), kwargs = CASES["mnist_coarse"].inputs(dtype)
        q[3, 1, 5, 2] = math.nan
        out = attention(q, k, v, backend=backend, **kwargs)
        assert out.isnan().any(-1).nonzero().tolist() == [[3, 1, 5]]

    def test_nan_in_a_key_reaches_every_query(self, backend, dtype):
        (q, k, v), kwargs = CASES["mnist_coarse"].inputs(dtype)
        k[3, 1, 48, 2] = math.nan
        out = attention(q, k, v, backend=backend, **kwargs)
        assert out.isnan().any(-1).nonzero().tolist() == [[3, 1, i] for i in range(49)]

    def test_a_key_of_minus_infinity_is_left_out(self, backend, dtype):
        (q, k, v), kwargs = CASES["many_tiles"].inputs(dtype)
        q = q.abs() + 0.1
        k = k.clone()
        k[:, :, 50:] = -math.inf
        out = attention(q, k, v, backend=backend, **kwargs)
        rest = attention(q[:, :, :50], k[:, :, :50], v[:, :, :50], backend=backend, **kwargs)
        assert_close(out[:, :, :50], rest, rest.double())


@pytest.mark.parametrize("backend", ON_CPU)
def test_positions_beyond_two_billion_numbers(backend):
    """Two positions 2**31 numbers apart, in memory that is only touched there."""
    memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    far = memory.as_strided((1, 1, 2, 8), (0, 0, 2**31, 1))
    near = torch.linspace(-2, 2, 16).bfloat16().reshape(1, 1, 2, 8)
    far.copy_(near)
    torch.testing.assert_close(
        attention(far, far, far, backend=backend), attention(near, near, near, backend=backend)
    )


@pytest.mark.parametrize("backend", ON_CPU)
@given(data=st.data())
def test_properties(backend, data):
    """Any shape: a mean of the values; of values that are all one, that one; close to the formula."""
    batch, heads = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    positions, width = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 80))
    dtype = data.draw(st.sampled_from(DTYPES))
    scale = data.draw(st.none() | st.floats(-2, 2, width=32))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    qkv = torch.randn((batch, positions, 3, heads, width), generator=generator).to(dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(q, k, v, scale=scale, backend=backend)
    expected = formula(q.double(), k.double(), v.double(), scale=scale)
    assert_close(out, torch_ops(q, k, v, scale=scale), expected)
    slack = 4 * torch.finfo(dtype).eps * (v.abs().max().float() if v.numel() else 0)
    assert (out.float() <= v.amax(2, keepdim=True).float() + slack).all()
    assert (out.float() >= v.amin(2, keepdim=True).float() - slack).all()
    ones = attention(q, k, torch.ones_like(v), scale=scale, backend=backend)
    torch.testing.assert_close(ones, torch.ones_like(v))


@pytest.mark.thinned
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("case", ["mnist", "odd"])
def test_compiles_into_one_graph(backend, case):
    args, kwargs = CASES[case].inputs()

    def function(*a):
        return attention(*a, backend=backend, **kwargs)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(with_gradients(compiled, args), with_gradients(function, args))


@pytest.mark.thinned
@requires_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["mnist_coarse", "odd_misaligned", "contiguous"])
def test_opcheck(case, dtype):
    (q, k, v), _ = CASES[case].inputs(dtype)
    operators = torch.ops.fused_diffusion
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(operators.attention.default, (*leaves, 0.3))
    out, logsumexp = operators.attention(q, k, v, 0.3)
    torch.library.opcheck(operators.attention_backward.default, (upstream(out), q, k, v, out, logsumexp, 0.3))


@requires_native
def test_there_is_no_second_derivative():
    args = [t.detach().requires_grad_() for t in CASES["odd"].inputs()[0]]
    (dq,) = torch.autograd.grad(attention(*args, backend="cpp").square().sum(), args[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
        dq.sum().backward()


@requires_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.zeros(2, 3, 4, 8).double(), k=torch.zeros(2, 3, 4, 8).double(),
              v=torch.zeros(2, 3, 4, 8).double()), "q must be float32, bfloat16 or float16"),
        (dict(q=torch.zeros(2, 3, 8, 4).mT), "q must have a contiguous last dimension"),
        (dict(k=torch.zeros(2, 3, 5, 8)), "k must be "),
        (dict(v=torch.zeros(2, 3, 4, 8).half()), "v must be "),
        (dict(k=torch.zeros(3, 4, 8)), "k must be "),
    ],
)  # fmt: skip
def test_the_operator_checks_what_it_is_given(change, message):
    arguments = {name: torch.zeros(2, 3, 4, 8) for name in "qkv"} | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_diffusion.attention(*arguments.values(), 1.0)


@requires_native
@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 3, 4, 9), "grad must be "),
        (0, torch.zeros(()).expand(2, 3, 4, 8), "grad must have a contiguous last dimension"),
        (4, torch.zeros(2, 3, 4, 8).half(), "out must be "),
        (5, torch.zeros(2, 3, 4).double(), "logsumexp must be "),
        (5, torch.zeros(2, 4, 3).mT, "logsumexp must be "),
    ],
)
def test_the_gradient_checks_what_it_is_given(position, value, message):
    arguments = [*(torch.zeros(2, 3, 4, 8) for _ in range(5)), torch.zeros(2, 3, 4), 1.0]
    arguments[position] = value
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fused_diffusion.attention_backward(*arguments)


@requires_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_read_through_their_strides(dtype):
    """Slices with gaps, one key for every position, one value for every head, and the gradient of a sum."""
    (q, k, v), _ = CASES["mnist_coarse"].inputs(dtype)
    k, v = k[1::2, :, 7:8].expand(-1, -1, 17, -1), v[1::2, :1, ::3].expand(-1, 4, -1, -1)
    views = [q[1::2, :, ::3], k, v]

    def results(args):
        leaves = [t.detach().requires_grad_() for t in args]
        out = attention(*leaves, backend="cpp")
        return out, *torch.autograd.grad(out.sum(), leaves)

    assert all(map(torch.equal, results(views), results([t.contiguous() for t in views])))


@requires_native
class TestChoice:
    def test_the_cpp_backend_declines_with_a_reason(self):
        x = torch.zeros(2, 2, 16, 64)
        for args, reason in (
            ((x.double(),) * 3, "q is torch.float64, not float32, bfloat16 or float16"),
            ((x, x.mT.contiguous().mT, x), "the last dimension of k is not contiguous"),
        ):
            with pytest.raises(ValueError, match=reason):
                attention(*args, backend="cpp")
            assert attention(*args).shape == x.shape

    @pytest.mark.skipif(_native.simd_in_use() == "baseline", reason="slower without AVX2")
    def test_auto_takes_what_the_benchmarks_favour(self):
        def chosen(batch, heads, positions, width, dtype, gradient=False):
            x = torch.zeros(batch, heads, positions, width, dtype=dtype, requires_grad=gradient)
            return explain(attention, x, x, x).splitlines()[0]

        assert chosen(8, 1, 49, 64, torch.float32) == "attention: cpp"
        assert chosen(1, 1, 49, 64, torch.float32) == "attention: reference"
        amx = _native.simd_in_use() == "amx"
        assert chosen(1, 1, 49, 64, torch.bfloat16) == f"attention: {'reference' if amx else 'cpp'}"
        assert chosen(1, 1, 49, 64, torch.float16) == "attention: cpp"
        assert chosen(1, 1, 49, 64, torch.bfloat16, gradient=True) == "attention: cpp"
        assert chosen(1, 1, 256, 256, torch.bfloat16) == "attention: cpp"
        assert chosen(1, 1, 1024, 256, torch.bfloat16, gradient=True) == "attention: cpp"
        many = chosen(1, 1, 1025, 64, torch.bfloat16, gradient=True)
        assert many == f"attention: {'reference' if amx else 'cpp'}"
        assert chosen(1, 1, 16, 64, torch.bfloat16) == "attention: reference"
        assert chosen(10**4, 1, 1, 64, torch.bfloat16) == "attention: reference"

    def test_explain_says_why_it_is_passed_over(self):
        x = torch.zeros(1, 1, 2, 4)
        baseline = _native.simd_in_use() == "baseline"
        reason = "without AVX2 it has not been measured" if baseline else "(1, 1, 2, 4) is so small that"
        assert f"not cpp: {reason}" in explain(attention, x, x, x)


class TestWhereCudaServes:
    """The tensors are fake: they have shapes, but no memory."""

    @pytest.fixture(autouse=True)
    def device(self, monkeypatch):
        monkeypatch.setattr(_native, "CUDA_MISSING", None)
        monkeypatch.setattr(native, "_shared_memory", lambda index: 101_376)

    @staticmethod
    def reason(*shape, dtype=torch.float32, device="cuda:0"):
        with FakeTensorMode():
            x = torch.empty(*shape, dtype=dtype, device=device)
        return native.supports_cuda(Arguments(x, x, x))

    def test_widths(self, monkeypatch):
        assert self.reason(1, 1, 16, 128) is None
        assert self.reason(1, 1, 16, 300) == "the width of a head is 300, more than 256"
        needs_more = "a head of width 129 needs more shared memory than this device has"
        assert self.reason(1, 1, 16, 129) == needs_more
        monkeypatch.setattr(native, "_shared_memory", lambda index: 166_912)
        assert self.reason(1, 1, 16, 129) is None

    @staticmethod
    def manner(*shape, dtype=torch.bfloat16):
        with FakeTensorMode():
            x = torch.empty(*shape, dtype=dtype, device="cuda:0")
        return native.manner_of_cuda(Arguments(x, x, x))

    def test_explain_tells_the_parts_of_the_keys(self, monkeypatch):
        """One head, 132 multiprocessors, and 64 keys at a time, which are read with their values."""
        monkeypatch.setattr(native, "_processors", lambda index: 132)
        assert self.manner(1, 1, 256, 256) == "the keys in 4 parts and their softmaxes merged"
        assert self.manner(1, 1, 1024, 64) == "the keys in 2 parts and their softmaxes merged"
        assert self.manner(1, 1, 256, 64) is None  # a block would read 48 KB less
        assert self.manner(4, 1, 256, 256) == "the keys in 2 parts and their softmaxes merged"
        assert self.manner(5, 1, 256, 256) is None  # 80 blocks
        assert self.manner(64, 1, 256, 256) is None
        assert self.manner(0, 1, 256, 256) is None

    def test_wgmma_is_taken_where_it_serves_and_fills_the_device(self, monkeypatch):
        monkeypatch.setattr(native, "_processors", lambda index: 132)
        monkeypatch.setattr(native, "_capability", lambda index: (9, 0))
        assert self.manner(66, 1, 256, 256) is None  # not before a device has run it
        monkeypatch.setattr(native, "WGMMA", True)
        assert self.manner(66, 1, 256, 256) == "by wgmma"
        assert self.manner(65, 1, 256, 256) is None  # 130 blocks
        assert self.manner(1, 1, 256, 256) == "the keys in 4 parts and their softmaxes merged"
        assert self.manner(132, 1, 64, 60) is self.manner(132, 1, 64, 64, dtype=torch.float32) is None
        for capability in ((8, 0), (10, 0), (12, 0)):
            monkeypatch.setattr(native, "_capability", lambda index, found=capability: found)
            assert self.manner(66, 1, 256, 256) is None

    def test_devices_and_dtypes(self):
        assert self.reason(1, 1, 16, 64, device="cpu") == "it runs on CUDA devices, not on cpu"
        assert "not float32, bfloat16 or float16" in self.reason(1, 1, 16, 64, dtype=torch.float64)


X = torch.zeros(2, 6, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention(X, X, X[:, :3]), "one shape"),
        (lambda: attention(X[0], X[0], X[0]), "one shape"),
        (lambda: attention(X, X.half(), X), "one floating-point dtype"),
        (lambda: attention(X.long(), X.long(), X.long()), "one floating-point dtype"),
        (lambda: attention(X, X, X, backend="quantum"), "no backend 'quantum'"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
