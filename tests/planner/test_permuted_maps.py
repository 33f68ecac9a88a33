"""Linear maps and convolutions over other dimensions of a map than its channels, of the same size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffusion
from helpers.native import requires_native
from helpers.tolerance import assert_close

pytestmark = requires_native


class Network(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.scale = function, nn.Parameter(torch.full((8,), 0.01))
        self.conv, self.pointwise = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.linear, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.rows_norm = nn.GroupNorm(4, 8), nn.LayerNorm(8)
        self.depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)

    def forward(self, x):
        return self.function(self, x)


def convnext(m, x):
    """A block of ConvNeXt, Liu et al. 2022, whose branch is a hundredth of its output."""
    h = F.gelu(m.linear(m.rows_norm(m.depthwise(x).permute(0, 2, 3, 1))))
    return x + (m.scale * m.out(h)).permute(0, 3, 1, 2)


NETWORKS = {
    "convnext": convnext,
    "linear of a convolution": lambda m, x: x + 0.01 * m.linear(F.silu(m.conv(x))),
    "linear of a norm": lambda m, x: x + 0.01 * m.linear(m.norm(x)),
    "linear of a norm and SiLU": lambda m, x: x + 0.01 * m.linear(F.silu(m.norm(x))),
    "two linear maps": lambda m, x: x + 0.01 * m.out(F.gelu(m.linear(x))),
    "linear of rows": lambda m, x: x + 0.01 * m.linear(F.silu(m.conv(x)).permute(0, 2, 3, 1)),
    "linear of columns": lambda m, x: x + 0.01 * m.linear(m.conv(x).transpose(2, 3)),
    "convolution of rows": lambda m, x: x + 0.01 * m.conv(F.silu(m.pointwise(x)).permute(0, 2, 3, 1)),
    "convolution of a norm's rows": lambda m, x: x + 0.01 * m.conv(F.silu(m.norm(x)).permute(0, 2, 3, 1)),
    "norm of rows": lambda m, x: x + 0.01 * m.conv(F.silu(m.norm(m.conv(x).permute(0, 2, 3, 1)))),
    "average of rows": lambda m, x: F.avg_pool2d(m.pointwise(x).permute(0, 2, 3, 1), 2),
    "doubled rows": lambda m, x: m.conv(F.interpolate(m.pointwise(x).permute(0, 2, 3, 1), scale_factor=2)),
    "sum with rows": lambda m, x: m.conv(x) + 0.01 * m.pointwise(x).permute(0, 2, 3, 1),
    "attention's rows": lambda m, x: (
        x + 0.01 * m.linear(m.norm(x).flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    ),
    "mixed pixels": lambda m, x: x + 0.01 * m.linear(m.conv(x).flatten(3)),
}


ONE_ROW = ["linear of a convolution", "linear of a norm", "linear of a norm and SiLU", "two linear maps"]
CASES = [(name, (batch, 8, 8, 8)) for name in NETWORKS for batch in (1, 2)]
CASES += [(name, (3, 8, height, 8)) for name in ONE_ROW for height in (1, 6)]


@torch.no_grad()
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_dimension_is_not_taken_for_the_channels(name, shape):
    torch.manual_seed(0)
    network, x = Network(NETWORKS[name]).eval(), torch.randn(shape)
    expected, peer = copy.deepcopy(network).double()(x.double()), network(x)
    actual = diffusion.accelerate(network)(x)
    assert "planned, exact" in network.report()
    assert_close(actual, peer, expected)
