"""Attention that networks write by themselves becomes the compiled op, whatever its products and layouts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffusion
from helpers.native import requires_native

pytestmark = requires_native
HEADS, WIDTH = 2, 8


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * WIDTH**-0.5, dim=-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("b h i d, b h j d -> b h i j", q * WIDTH**-0.5, k).softmax(dim=-1)
    return torch.einsum("b h i j, b h j d -> b h i d", weights, v)


def by_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys before queries, as [B, H, keys, queries]."""
    logits = torch.einsum("bhjd,bhid->bhji", k / WIDTH**0.5, q).float()
    return torch.einsum("xyji,xyjd->xyid", F.softmax(logits, dim=2).to(q.dtype), v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    weights = torch.bmm(q, k.transpose(1, 2)).div(WIDTH**0.5).softmax(-1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


def by_baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    zeros = q.new_zeros(q.shape[0], q.shape[1], k.shape[1])
    logits = torch.baddbmm(zeros, q, k.transpose(1, 2), beta=0, alpha=WIDTH**-0.5)
    return torch.bmm(logits.softmax(-1), v).unflatten(0, (-1, HEADS))


def of_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A softmax over the queries, which is no attention."""
    return torch.softmax(q @ k.transpose(-1, -2), dim=-2) @ v


def read_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.softmax(q @ k.transpose(-1, -2), dim=-1)
    return weights @ v + weights.mean(dim=-1, keepdim=True)


def of_one_side(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The product takes the softmax transposed."""
    return torch.einsum("bhij,bhid->bhjd", torch.softmax(q @ k.transpose(-1, -2), dim=-1), v)


class Attention(nn.Module):
    """Attention of x [B, S, 16] to `context`, [B, T, 16]."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        given = (self.q(x), self.k(context), self.v(context))
        q, k, v = (value.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for value in given)
        return self.out(self.function(q, k, v).transpose(1, 2).flatten(2)) + x


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("positions", [20, 7, 1])
@pytest.mark.parametrize(
    ("function", "fused"),
    [
        *((function, 1) for function in (by_matmul, by_einsum, by_keys, by_bmm, by_baddbmm)),
        *((function, 0) for function in (of_queries, read_twice, of_one_side)),
    ],
)
def test_any_products(function, fused, positions, batch):
    if function is of_one_side and positions != 20:
        pytest.skip("it needs as many keys as queries")
    module = Attention(function).eval()
    x, context = torch.randn(batch, 20, 16), torch.randn(batch, positions, 16)
    expected = Attention(function).double()(x.double(), context.double())
    actual = diffusion.accelerate(module)(x, context)
    assert f"{fused} attentions" in module.report()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
