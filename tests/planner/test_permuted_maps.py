"""Maps that are read in another order, or written in another shape, than their own."""

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


def check(network, shape):
    torch.manual_seed(0)
    network, x = network.eval(), torch.randn(shape)
    expected, peer = copy.deepcopy(network).double()(x.double()), network(x)
    actual = diffusion.accelerate(network)(x)
    assert "planned, exact" in network.report()
    assert_close(actual, peer, expected)


@torch.no_grad()
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_a_dimension_is_not_taken_for_the_channels(name, shape):
    check(Network(NETWORKS[name]), shape)


class Convolved(Network):
    """A network of one convolution or linear map."""

    def __init__(self, function, conv):
        super().__init__(function)
        self.one = conv


def conv(**options):
    return nn.Conv2d(8, 8, options.pop("kernel_size", 3), **options)


RESHAPED = {
    "one column": (lambda m, x: m.one(x).view(2, 8, -1, 1) * 0.5, conv(padding=1)),
    "a sum of columns": (
        lambda m, x: m.one(x).flatten(2)[..., None] + x.flatten(2)[..., None],
        conv(padding=1),
    ),
    "one row": (lambda m, x: F.silu(m.one(x)).reshape(2, 8, 1, 16) * 0.5, conv(padding=1)),
    "without padding": (lambda m, x: m.one(x).reshape(2, 8, 1, 4) * 0.5, conv()),
    "a stride": (lambda m, x: m.one(x).reshape(2, 8, 1, 4) * 0.5, conv(stride=2, padding=1)),
    "padded below": (lambda m, x: m.one(F.pad(x, (0, 1, 0, 1))).reshape(2, 8, 1, 4) * 0.5, conv(stride=2)),
    "a kernel of one": (lambda m, x: m.one(x).reshape(2, 8, 1, 16) * 0.5, conv(kernel_size=1)),
    "its stride": (lambda m, x: m.one(x).reshape(2, 8, 1, 4) * 0.5, conv(kernel_size=1, stride=2)),
    "its padding": (lambda m, x: m.one(x).reshape(2, 8, 4, 9) * 0.5, conv(kernel_size=1, padding=1)),
    "a doubled map": (
        lambda m, x: m.one(F.interpolate(x, scale_factor=2)).reshape(2, 8, 4, 16) * 0.5,
        conv(padding=1),
    ),
    "pixels of a square, repeated": (
        lambda m, x: m.one(x[:, :, None, ::2, ::2].expand(2, 8, 4, 2, 2).reshape(2, 32, 2, 2)),
        nn.Conv2d(32, 8, 1),
    ),
    "a channel of a square twice": (
        lambda m, x: m.one(F.pixel_unshuffle(x, 2)[:, [0, 0, *range(2, 32)]]),
        nn.Conv2d(32, 8, 1),
    ),
    "short vectors": (lambda m, x: m.one(F.normalize(x * 3e-7, dim=-1, eps=1e-6)), nn.Linear(4, 8)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", RESHAPED)
def test_another_height_and_width(name):
    check(Convolved(*RESHAPED[name]), (2, 8, 4, 4))


@torch.no_grad()
def test_a_map_of_one_row_transposed():
    network = Convolved(lambda m, x: m.one(x).transpose(2, 3) * 0.5 + x.transpose(2, 3), conv(padding=1))
    check(network, (2, 8, 1, 6))
