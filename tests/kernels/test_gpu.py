"""Every op, backend and case on a CUDA device, against the reference in float64 on the CPU."""

import math

import pytest
import torch

import diffusion
from diffusion import kernels
from diffusion.kernels import (
    attention,
    group_norm_silu,
    philox_normal,
    reverse_step,
    reverse_step_,
    step_counter,
)
from diffusion.kernels.ops.attention import native
from diffusion.kernels.ops.attention.arguments import Arguments
from diffusion.kernels.ops.attention.cases import CASES as ATTENTION_CASES
from diffusion.kernels.ops.attention.cases import Case
from diffusion.kernels.ops.biased_sum.library import biased_sum_
from diffusion.kernels.ops.group_norm_silu.cases import CASES as NORM_CASES
from diffusion.kernels.ops.reverse_step.cases import CASES as STEP_CASES
from diffusion.kernels.ops.reverse_step.cases import EPSILON
from diffusion.kernels.ops.reverse_step.library import step_embeddings_
from helpers.tensors import cast
from helpers.tolerance import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

FUNCTIONS = {"group_norm_silu": group_norm_silu, "attention": attention}
OPS = {"group_norm_silu": NORM_CASES, "attention": ATTENTION_CASES}
BACKENDS = ("cuda", "triton")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = [(name, case) for name, cases in OPS.items() for case in cases]


WGMMA_CASES = ATTENTION_CASES | {
    "ddpm": Case(2, 1, 256, 256, packed=True),
    "many_tiles": Case(1, 2, 1000, 128, packed=True),
    "wide_apart": Case(2, 2, 129, 64, std=30.0),
    "fills_the_device": Case(140, 1, 128, 64, packed=True),
}


def served(op, backend, args, kwargs):
    """Skips where the backend does not serve the call, with its reason."""
    public = kernels.OPS[op]
    if backend not in public.op.backends:
        pytest.skip(f"{op} has no {backend} backend")
    try:
        public.op.choose(public.arguments(*args, **kwargs), backend)
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), ALL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_value(backend, name, case, dtype):
    cases = OPS[name]
    call = cases[case].inputs(dtype)
    args, kwargs = cast(*call, device="cuda")
    served(name, backend, args, kwargs)
    out = FUNCTIONS[name](*args, backend=backend, **kwargs)
    assert (
        out.stride() == FUNCTIONS[name](*args, backend="reference", **kwargs).stride() or name == "attention"
    )
    exact_args, exact_kwargs = cast(*call, dtype=torch.float64)
    expected = FUNCTIONS[name](*exact_args, backend="reference", **exact_kwargs)
    peer = FUNCTIONS[name](*call[0], backend="reference", **call[1])
    assert_close(out.cpu(), peer, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", WGMMA_CASES)
def test_value_of_attention_by_wgmma(case, dtype):
    """Also where `attention` does not take this kernel by itself."""
    call = WGMMA_CASES[case].inputs(dtype)
    args, kwargs = cast(*call, device="cuda")
    served("attention", "cuda", args, kwargs)
    arguments = Arguments(*args, **kwargs)
    if reason := native.refuses_wgmma(arguments):
        pytest.skip(reason)
    out = native.attention_by_wgmma(arguments).cpu()
    exact_args, exact_kwargs = cast(*call, dtype=torch.float64)
    expected = attention(*exact_args, backend="reference", **exact_kwargs)
    assert_close(out, attention(*call[0], backend="reference", **call[1]), expected)


@pytest.mark.parametrize("shape", [(1, 1, 256, 256), (1, 1, 1024, 64), (1, 2, 600, 130)], ids=str)
def test_attention_with_the_keys_in_parts(shape):
    call = Case(*shape, packed=True).inputs(torch.bfloat16)
    args, kwargs = cast(*call, device="cuda")
    served("attention", "cuda", args, kwargs)
    out = attention(*args, backend="cuda", **kwargs)
    expected = attention(*cast(*call, dtype=torch.float64)[0], backend="reference", **kwargs)
    assert_close(out.cpu(), attention(*call[0], backend="reference", **kwargs), expected)
    assert torch.equal(attention(*args, backend="cuda", **kwargs), out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(*args, backend="cuda", **kwargs)
    graph.replay()
    assert torch.equal(captured, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "case"), ALL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient(backend, name, case, dtype):
    """Every tensor's gradient under a random weighting of the output."""
    cases = OPS[name]
    call = cases[case].inputs(dtype)
    served(name, backend, *cast(*call, device="cuda"))
    weights = torch.randn(call[0][0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradients(backend, **to):
        args, kwargs = cast(*call, **to)
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        for tensor in tensors:
            tensor.requires_grad_()
        served(name, backend, args, kwargs)
        out = FUNCTIONS[name](*args, backend=backend, **kwargs)
        grads = torch.autograd.grad(out, tensors, weights.to(out.device, out.dtype))
        return [grad.cpu() for grad in grads]

    expected = gradients("reference", dtype=torch.float64)
    peer = gradients("reference", device="cpu")
    for grad, one, truth in zip(gradients(backend, device="cuda"), peer, expected, strict=True):
        assert_close(grad, one, truth)


@pytest.mark.parametrize("case", STEP_CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reverse_step(backend, dtype, case):
    call = STEP_CASES[case].inputs(dtype)
    args, kwargs = cast(*call, device="cuda")
    served("reverse_step", backend, args, kwargs)
    actual = reverse_step(*args, backend=backend, **kwargs)
    exact = cast(*call, dtype=torch.float64)
    expected = reverse_step(*exact[0], backend="reference", **exact[1])
    peer = reverse_step(*call[0], backend="reference", **call[1])
    for one, other, truth in zip(actual, peer, expected, strict=True):
        assert_close(one.cpu(), other, truth)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normals(backend):
    """The integers are the same, and so are the normals, to 2 ulp."""
    if backend not in kernels.OPS["philox_normal"].op.backends:
        pytest.skip(f"philox_normal has no {backend} backend")
    shape, ids = (5, 3, 65, 67), torch.tensor([0, 7, 2**35, 2**62, 1])
    arguments = dict(seed=2**63 + 5, stream=9)
    expected = philox_normal(shape, sample_ids=ids, backend="reference", **arguments)
    z = philox_normal(shape, sample_ids=ids.cuda(), device="cuda", backend=backend, **arguments).cpu()
    ulp = torch.nextafter(expected.abs(), torch.tensor(math.inf)) - expected.abs()
    assert ((z - expected).abs() <= 2 * ulp).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1, 2])
def test_biased_sum(scale, dtype):
    generator = torch.Generator().manual_seed(0)
    last = {"memory_format": torch.channels_last}
    x, residual = (
        torch.randn(3, 16, 5, 7, generator=generator).to(dtype).contiguous(**last) for _ in range(2)
    )
    bias = torch.randn(16, generator=generator).to(dtype)
    results = []
    for device in ("cpu", "cuda"):
        wide = torch.zeros(3, 40, 5 * scale, 7 * scale, dtype=dtype, device=device).contiguous(**last)
        given = (x.to(device), bias.to(device), residual.to(device))
        biased_sum_(*given, wide[:, :16], wide[:, -16:], scale=scale)
        results.append(wide.cpu())
    assert torch.equal(*results)


@pytest.mark.parametrize("width", [6, 520])
def test_embeddings_of_a_step(width):
    embeddings, index = torch.randn(4, 3, width, device="cuda"), torch.tensor([2, 0, 1], device="cuda")
    counter, out = step_counter(0, device="cuda"), torch.zeros(3, width, device="cuda")
    counter[0] = 11
    step_embeddings_(embeddings, counter, index, out)
    assert torch.equal(out, embeddings[3][index])


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_a_captured_step_is_a_sampler(channels_last):
    """One graph of `reverse_step_`, replayed: rows and streams follow the counter, as in the plain chain."""
    rows = [
        EPSILON._replace(guidance_scale=2.5),
        EPSILON._replace(coef_x0_prev=-0.1, sigma=0.2),
        EPSILON._replace(sigma=0.0),
    ]
    table = torch.tensor(rows, dtype=torch.float64, device="cuda")
    x, both = torch.randn(3, 3, 16, 16), torch.randn(6, 3, 16, 16)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    both = both.to("cuda").contiguous(memory_format=layout)
    ids = torch.tensor([5, 2**40, 0], device="cuda")
    unet_input = torch.zeros(6, 3, 16, 16, device="cuda", dtype=torch.bfloat16).contiguous(
        memory_format=layout
    )
    state, x0 = x.cuda(), torch.zeros(3, 3, 16, 16, device="cuda")
    counter = step_counter(7, device="cuda")

    def step():
        cond, uncond = both.chunk(2)
        reverse_step_(
            state,
            cond,
            table,
            counter,
            sample_ids=ids,
            model_output_uncond=uncond,
            x0=x0,
            unet_input=unet_input,
            backend="cuda",
        )

    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        step()
    warm.synchronize()
    state.copy_(x)
    x0.zero_()
    counter.copy_(step_counter(7, device="cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in rows:
        graph.replay()
    expected, expected_x0 = x, torch.zeros_like(x)
    for i, row in enumerate(rows):
        cond, uncond = both.cpu().chunk(2)
        expected, expected_x0 = reverse_step(
            expected,
            cond,
            row,
            model_output_uncond=uncond,
            x0_prev=expected_x0,
            seed=7,
            sample_ids=ids.cpu(),
            stream=1 + i,
            backend="reference",
        )
    torch.testing.assert_close(state.cpu(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(unet_input, torch.cat([state, state]).to(torch.bfloat16))
    assert counter.tolist() == [len(rows), 7, 1, 0]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_capture_and_replay(backend, name):
    cases = OPS[name]
    case = "cifar10" if "cifar10" in cases else next(iter(cases))
    args, kwargs = cast(*cases[case].inputs(torch.bfloat16), device="cuda")
    served(name, backend, args, kwargs)
    expected = FUNCTIONS[name](*args, backend=backend, **kwargs)  # also tunes and compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = FUNCTIONS[name](*args, backend=backend, **kwargs)
    out.fill_(math.nan)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_the_31_elements(backend):
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("less than 24 GiB of free memory")
    x = torch.randn(2, 1024, 1025, 1024, device="cuda", dtype=torch.bfloat16)
    served("group_norm_silu", backend, (x, 32), {})
    y = group_norm_silu(x, 32, backend=backend)
    expected = group_norm_silu(x[-1:, -32:].float(), 1, backend="reference")
    torch.testing.assert_close(y[-1:, -32:].float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_of_positions_beyond_two_billion_numbers(backend):
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("less than 8 GiB of free memory")
    memory = torch.empty(2**31 + 64, device="cuda", dtype=torch.bfloat16)
    far = memory.as_strided((1, 1, 2, 8), (0, 0, 2**31, 1))
    near = torch.linspace(-2, 2, 16, device="cuda").to(torch.bfloat16).reshape(1, 1, 2, 8)
    far.copy_(near)
    served("attention", backend, (far, far, far), {})
    assert torch.equal(
        attention(far, far, far, backend=backend), attention(near, near, near, backend=backend)
    )


def test_the_bundled_model_draws_the_same_digits():
    import diffusion

    model = diffusion.load("mnist")
    arguments = dict(labels=list(range(10)), guidance_scale=2.0, sampler="ddim", steps=20, seed=0)
    expected = model.sample(**arguments, device="cpu")
    actual = model.sample(**arguments, device="cuda").cpu()
    assert (actual - expected).abs().max() < 1e-2


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "ddim"},
        {"sampler": "ddpm", "steps": 100},
        {"sampler": "dpm++"},
        {"sampler": "ddim", "guidance_interval": (300, 700)},
    ],
)
def test_sampling_in_graphs(options, precision):
    """Captured, replayed for a second batch, and without graphs in plain PyTorch: the same images."""
    model = diffusion.load("mnist", "cuda")
    options = {"steps": 20, "guidance_scale": 2.0, "seed": 1} | options
    first = model.sample([3, 1, 4], precision=precision, **options)
    assert torch.equal(model.sample([3, 1, 4], precision=precision, **options), first)
    expected = model.sample([3, 1, 4], backend="reference", **options)
    if precision == "exact":
        assert (first - expected).abs().max() < 1e-3
    else:
        assert (first - expected).abs().mean() < 0.05
    other = model.sample([5, 5, 6], precision=precision, **options | {"seed": 2})
    assert (other - first).abs().max() > 0.1
