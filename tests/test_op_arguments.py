"""Arguments of the ops that no backend may take, and what the in-place op tells autograd."""

import pytest
import torch
from diffusion.kernels import (
    attention,
    benchmark_table,
    group_norm_silu,
    reverse_step,
    reverse_step_,
    step_counter,
)
from diffusion.kernels.reverse_step.cases import EPSILON

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


@pytest.mark.parametrize("change", [{"clip": -1.0}, {"a": float("nan")}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows(backend, change):
    x = torch.zeros(1, 1, 2)
    with pytest.raises(ValueError, match=r"clip must not be negative|holds NaN"):
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
    [{"ops": "attention"}, {"cases": "mnist"}, {"dtypes": ["float32"]}, {"dtypes": [torch.int32]}],
)
def test_benchmark_table(arguments):
    with pytest.raises(ValueError, match=r"lists of names|unknown dtype"):
        benchmark_table(**arguments)
