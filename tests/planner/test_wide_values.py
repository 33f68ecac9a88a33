"""Networks of 16 bits compute in float32 where they say so, planned as in PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffusion
from diffusion.planner import weights as planner_weights
from helpers.native import requires_native

pytestmark = requires_native
LARGE = 1e4  # times a number of order ten it overflows in float16


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    """Plans the small networks of these tests as large ones are planned."""
    monkeypatch.setattr(planner_weights, "SMALL_NETWORK", 0)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.linear, self.qkv = nn.Linear(8, 8), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolution's output is there so that something is planned."""
        return self.conv(x), self.function(self, x)


def normalised(m: Function, x: Tensor) -> Tensor:
    return F.group_norm(x.float(), 4, m.norm.weight.float(), m.norm.bias.float(), 1e-5)


def attention(m: Function, x: Tensor, wide: bool) -> Tensor:
    rows = x.flatten(2).transpose(1, 2) / 8
    q, k, v = (part[:, None] for part in m.qkv(rows).chunk(3, dim=-1))
    logits = (q.float() @ k.float().mT) * 0.35
    weights = logits.softmax(-1)
    return (weights @ (v.float() * LARGE)) if wide else weights.to(v.dtype) @ v


def rms(m: Function, x: Tensor) -> Tensor:
    rows = x.flatten(2).transpose(1, 2).float()
    return rows * (rows.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * LARGE


# Each is computed from float32 values of x alone, so that PyTorch's result is met to float32's rounding.
FROM_X = {
    "a sum of squares": lambda m, x: x.float().square().sum(),
    "squares of many": lambda m, x: (x.float() * 300).square().mean((1, 2, 3)),
    "what is narrowed, too": lambda m, x: (m.conv(x.float().mul(0.5).to(x.dtype)) * 0, x.float().mul(0.5))[1],
    "a norm": lambda m, x: normalised(m, x),
    "a norm of pixels": rms,
    "doubled": lambda m, x: F.interpolate(x.float() * LARGE, scale_factor=2.0),
    "averaged": lambda m, x: F.avg_pool2d(x.float() * LARGE, 2),
    "joined maps": lambda m, x: torch.cat([x.float() * LARGE, x.float()], dim=1),
    "joined rows": lambda m, x: torch.cat([x.flatten(2).float() * LARGE, x.flatten(2).float()], dim=2),
    "a map in float32": lambda m, x: F.linear(x.mT.float() * LARGE, m.linear.weight.float()[:, :8]),
    "an activation": lambda m, x: F.silu(x.float() * LARGE),
}
# Functions after a value that is rounded to the module's dtype, in which the plan may round another way.
OF_MAPS = {
    "a factor": lambda m, x: m.conv(x).float() * LARGE,
    "an activation of a map": lambda m, x: F.gelu(m.conv(x).float() * LARGE),
    "a sum": lambda m, x: m.conv(x).float() + x.float() * LARGE,
    "attention": lambda m, x: attention(m, x, wide=True),
}


def make(function, dtype: torch.dtype) -> tuple[Function, Tensor]:
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * 8
    return Function(function).eval().to(dtype), x.to(dtype)


@torch.no_grad()
@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*FROM_X, *OF_MAPS])
def test_float32_in_modules_of_sixteen_bits(name, dtype):
    module, x = make((FROM_X | OF_MAPS)[name], dtype)
    expected = module(x)[1]
    assert expected.isfinite().all()
    actual = diffusion.accelerate(module)(x)[1]
    assert "planned, exact" in module.report()
    assert actual.dtype == torch.float32
    allowed = 1e-5 if name in FROM_X else 4 * torch.finfo(dtype).eps
    assert (actual - expected).abs().max() <= allowed * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize(
    ("function", "fused"),
    [
        (lambda m, x: m.conv(F.silu(normalised(m, x)).to(x.dtype)), "1 with the norm before them"),
        (lambda m, x: m.linear(attention(m, x, wide=False)), "1 attentions"),
        (lambda m, x: F.gelu(m.conv(x).float()).to(x.dtype), "1 with an activation"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_is_narrowed_again_is_fused(function, fused, dtype):
    module, x = make(function, dtype)
    expected = module(x)[1]
    actual = diffusion.accelerate(module)(x)[1]
    assert fused in module.report()
    assert actual.dtype == dtype
    assert (actual - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.abs().max()
