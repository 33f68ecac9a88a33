"""Arguments of the ops that no backend may take, and what the in-place op tells autograd."""

import pytest
import torch

from diffusion.kernels import (
    attention,
    benchmark_table,
    explain,
    group_norm_silu,
    philox_normal,
    reverse_step,
    reverse_step_,
    step_counter,
)
from diffusion.kernels.ops.reverse_step.cases import EPSILON

BACKENDS = ["auto", "cpp", "reference"]


@pytest.mark.parametrize("heads", [1, 8])
def test_attention_on_two_devices(heads):
    q = torch.randn(1, heads, 64, 64)
    with pytest.raises(ValueError, match="k is on meta, not on q's cpu"):
        attention(q, q.to("meta"), q)


@pytest.mark.parametrize("shape", [(0, 2, 4, 8), (2, 0, 4, 8), (2, 2, 0, 8), (2, 2, 4, 0)])
def test_gradient_of_an_empty_attention(shape):
    t = torch.zeros(shape, requires_grad=True)
    attention(t, t, t).sum().backward()
    assert t.grad.shape == shape


@pytest.mark.parametrize("eps", [-1e-5, float("nan")])
def test_eps(eps):
    with pytest.raises(ValueError, match="eps must not be negative or NaN"):
        group_norm_silu(torch.ones(1, 2, 3), 1, eps=eps)


@pytest.mark.parametrize("change", [{"clip_x0": -1.0}, {"coef_x": float("nan")}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows(backend, change):
    x = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=r"clip_x0 must not be negative|holds NaN"):
        reverse_step(x, x, EPSILON._replace(**change), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_what_is_overwritten(backend):
    """A gradient that needs the former x is refused, not wrong."""
    weight, x = torch.tensor(2.0, requires_grad=True), torch.ones(1, 1, 4)
    y = (weight * x).sum()
    table = torch.tensor([EPSILON], dtype=torch.float64)
    ids = torch.arange(1)
    with torch.no_grad():
        reverse_step_(x, x.clone(), table, step_counter(0), sample_ids=ids, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    "arguments",
    [
        {"ops": "attention"},
        {"cases": "mnist"},
        {"dtypes": ["float32"]},
        {"dtypes": [torch.int32]},
        {"seconds": -1},
        {"seconds": float("nan")},
    ],
)
def test_benchmark_table(arguments):
    with pytest.raises(ValueError, match=r"lists of names|unknown dtype|seconds must be"):
        benchmark_table(**arguments)


def differentiable_calls():
    row = EPSILON
    x = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return {
        "group_norm_silu": (lambda t, **how: group_norm_silu(t, 4, **how), x),
        "attention": (lambda t, **how: attention(t, t.flip(1), t.square(), **how), x),
        "reverse_step": (lambda t, **how: reverse_step(t, t.sin(), row, seed=1, **how)[0], x),
    }


@pytest.mark.parametrize("op", ["group_norm_silu", "attention", "reverse_step"])
def test_forward_mode(op):
    """The peer is difference quotients in float64; compiled operators, without tangents, would give zeros."""
    function, x = differentiable_calls()[op]
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    _, actual = torch.func.jvp(function, (x,), (tangent,))
    step = 1e-5 * tangent.double()
    above, below = (function(x.double() + sign * step, backend="reference") for sign in (1, -1))
    expected = (above - below) / 2e-5
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        again = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    torch.testing.assert_close(again, actual)


@pytest.mark.parametrize("op", ["group_norm_silu", "attention", "reverse_step"])
def test_transforms_of_torch_func(op):
    function, x = differentiable_calls()[op]
    variable = x.clone().requires_grad_()
    function(variable).sum().backward()
    gradient = torch.func.grad(lambda t: function(t).sum())(x)
    torch.testing.assert_close(gradient, variable.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"a transform of torch\.func is active"):
        torch.func.grad(lambda t: function(t, backend="cpp").sum())(x)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e30, -1e30, 0.0, 3e9])
def test_attention_to_the_largest_logit(scale, dtype, backend):
    """With logits so far apart, all weight is on the largest: the result is known without an exponential."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, 16, generator=generator).to(dtype) for _ in range(3))
    actual = attention(q, k, v, scale=scale, backend=backend)
    if scale == 0:
        expected = v.double().mean(-2, keepdim=True).expand_as(v)
    else:
        logits = q.double() @ k.double().mT * scale
        expected = torch.take_along_dim(v.double(), logits.argmax(-1)[..., None], -2)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 4, 0), (0, 4, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_group_norm_of_nothing(shape, backend):
    assert group_norm_silu(torch.ones(shape), 1, backend=backend).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [-1, 1])
def test_steps_outside_of_the_table(step, backend):
    x, counter = torch.zeros(1, 1, 4), step_counter(0)
    counter[0] = step
    table = torch.tensor([EPSILON], dtype=torch.float64)
    with pytest.raises(RuntimeError, match=f"step {step} is outside of the table's 1"):
        reverse_step_(x, x.clone(), table, counter, sample_ids=torch.arange(1), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_needs_the_former_x0(backend):
    x, table = torch.zeros(1, 1, 4), torch.tensor([EPSILON._replace(coef_x0_prev=1.0)], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="the previous x0 is needed"):
        reverse_step_(x, x.clone(), table, step_counter(0), sample_ids=torch.arange(1), backend=backend)


def test_an_output_that_overlaps_itself():
    x, table = torch.zeros(2, 1, 4), torch.tensor([EPSILON], dtype=torch.float64)
    options = {"sample_ids": torch.arange(2), "unet_input": torch.zeros(1, 1, 4).expand(2, 1, 4)}
    with pytest.raises(ValueError, match="unet_input is written to"):
        reverse_step_(x, x.clone(), table, step_counter(0), **options)


X = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_norm_silu(X, 2.0), "num_groups must be an integer, not 2.0"),
        (lambda: group_norm_silu(X, True), "num_groups must be an integer, not True"),
        (lambda: attention(X[None], X[None], X[None], scale=True), "scale must be a number, not True"),
        (lambda: philox_normal((2, 3), seed=True), "seed must be an integer, not True"),
        (lambda: group_norm_silu(X, None), "num_groups must be an integer, not None"),
        (lambda: group_norm_silu(X, 2, [1.0]), "weight must be a tensor or None, not list"),
        (lambda: group_norm_silu(X, 2, eps="a"), "eps must be a number, not 'a'"),
        (lambda: group_norm_silu(X.tolist(), 2), "x must be a tensor, not list"),
        (lambda: attention(X[None], X[None], None), "v must be a tensor, not NoneType"),
        (lambda: attention(X[None], X[None], X[None], scale="a"), "scale must be a number"),
        (lambda: philox_normal((2, 3), seed=1.5), "seed must be an integer, not 1.5"),
        (lambda: philox_normal((2.0, 3), seed=1), "a size in shape must be an integer, not 2.0"),
        (lambda: philox_normal(4, seed=1), r"shape must be \[B, ...\], not 4"),
        (lambda: philox_normal((2, 3), seed=1, stream=0.5), "stream must be an integer, not 0.5"),
        (lambda: philox_normal((2, 3), seed=1, sample_ids=[0.5, 1]), "a sample id must be an integer"),
        (lambda: philox_normal((2, 3), seed=torch.tensor(1)), "seed must be an integer"),
        (lambda: reverse_step(X, X, None), "row must be the 12 numbers of StepCoefficients, not None"),
        (lambda: reverse_step(X, X, torch.tensor(1.0)), "row must be the 12 numbers"),
        (lambda: reverse_step(X, X, ["1"] * 12), "an entry of row must be a number"),
        (lambda: reverse_step(X, X, EPSILON, noise=1), "noise must be a tensor or None, not int"),
        (
            lambda: reverse_step_(X, X, [[0.0]], step_counter(0), sample_ids=torch.arange(2)),
            "table must be a tensor, not list",
        ),
    ],
)
def test_arguments_of_another_type(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: group_norm_silu(X, 2**63), "4 channels cannot be divided"),
        (lambda: group_norm_silu(X[:, :0], 2**40), "0 channels cannot be divided"),
        (lambda: reverse_step(X, X, EPSILON, noise=X.to(torch.complex64)), "noise is torch.complex64"),
        (
            lambda: reverse_step_(
                X, X, torch.zeros(12).double(), step_counter(0), sample_ids=torch.arange(2)
            ),
            r"table has shape \(12,\), not \(12, 12\)",
        ),
        (
            lambda: reverse_step_(
                X, X, torch.zeros(1, 12).double(), torch.zeros(8).long()[::2], sample_ids=torch.arange(2)
            ),
            "counter must be contiguous torch.int64, not strided torch.int64",
        ),
        (lambda: explain("attention", X, X, X), "one shape"),
        (lambda: group_norm_silu(X, 2, eps=10**400), "eps must be a number that a float can hold"),
        (lambda: attention(X[None], X[None], X[None], scale=10**400), "scale must be a number that a float"),
    ],
)
def test_values_that_no_backend_takes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
