"""A node at which the planner fails stays a call of PyTorch; all others are planned."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffusion
from diffusion.planner import layout, weights
from diffusion.planner.fusion import activations, norms, siblings
from helpers.native import requires_native

pytestmark = requires_native


class Blocks(nn.Module):
    """Two blocks of 16 and 24 channels, each with attention, and a second output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        widths = (16, 24)
        self.norms = nn.ModuleList(nn.GroupNorm(4, w) for w in widths)
        self.convs = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for w in widths)
        self.qkv = nn.ModuleList(nn.ModuleList(nn.Linear(w, w) for _ in range(3)) for w in widths)
        self.wider = nn.Conv2d(16, 24, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for i in range(2):
            x = self.convs[i](F.silu(self.norms[i](x) * (1 + x.mean((2, 3))[:, :, None, None]))) + x
            rows = x.flatten(2).transpose(1, 2)
            q, k, v = (linear(rows)[:, None] for linear in self.qkv[i])
            h = F.scaled_dot_product_attention(q, k, v)
            x = x + h[:, 0].transpose(1, 2).reshape(x.shape)
            x = F.silu(self.wider(x)) if i == 0 else x
        return x, x.flatten(1).norm(dim=1)


def check(reasons: int) -> str:
    """Results equal the network's; the report has as many faults, and all else is fused."""
    network, x = Blocks().eval(), torch.randn(2, 16, 8, 6, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(network).double()(x.double())
    diffusion.accelerate(network)
    for _ in range(2):
        for actual, wanted in zip(network(x), expected, strict=True):
            assert (actual - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    report = network.report()
    assert "planned, exact" in report
    assert report.count("OverflowError: it is 24 wide") == reasons, report
    return report


def failing(function, is_at_fault):
    def run(*args, **kwargs):
        if is_at_fault(*args, **kwargs):
            raise OverflowError("it is 24 wide")
        return function(*args, **kwargs)

    return run


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    monkeypatch.setattr(weights, "SMALL_NETWORK", 0)


@torch.no_grad()
def test_without_faults():
    assert "5 convolutions and linear maps, 2 with the norm before them" in check(0)


@torch.no_grad()
def test_in_the_fusion_of_a_norm(monkeypatch):
    wrapped = failing(norms.vector_of, lambda value, like, **_: like.shape[1] == 24)
    monkeypatch.setattr(norms, "vector_of", wrapped)
    report = check(1)
    assert "1 with the norm before them" in report
    assert "group_norm [2, 24, 6, 4]: OverflowError" in report


@torch.no_grad()
def test_in_the_fusion_of_an_activation(monkeypatch):
    wrapped = failing(activations._take_activation, lambda node, graph: node.output.shape[1] == 24)
    monkeypatch.setattr(activations, "_take_activation", wrapped)
    assert "conv2d [2, 24, 6, 4]: OverflowError" in check(2)  # of the two convolutions


@torch.no_grad()
def test_in_the_layout_of_what_many_nodes_became(monkeypatch):
    """A convolution with the norm before it and the sum after it: all of them are calls."""
    wrapped = failing(
        layout.convolution_arguments,
        lambda image, packed, out, **_: image.shape[1] == out.shape[1] == 24 and out.shape[2] == 6,
    )
    monkeypatch.setattr(layout, "convolution_arguments", wrapped)
    report = check(6)
    for function in ("group_norm", "mul", "silu", "conv2d", "add"):
        assert f"{function} [2, 24, 6, 4]: OverflowError" in report
    assert "add [2, 24, 1, 1]: OverflowError" in report  # of one to the scale
    assert "4 convolutions and linear maps, 1 with the norm before them" in report


@torch.no_grad()
def test_in_maps_that_were_joined(monkeypatch):
    wrapped = failing(siblings._join, lambda graph, nodes: nodes[0].output.shape[-1] == 24)
    monkeypatch.setattr(siblings, "_join", wrapped)
    assert "2 x linear [2, 24, 24]: OverflowError" in check(1)  # the third one has nothing to be joined with


@torch.no_grad()
def test_in_an_operator(monkeypatch):
    """A convolution refuses its input's dtype."""
    arguments = layout.convolution_arguments

    def wrong(image, packed, out, **options):
        image = image.double() if (image.shape[1], out.shape[1]) == (16, 24) else image
        return arguments(image, packed, out, **options)

    monkeypatch.setattr(layout, "convolution_arguments", wrong)
    assert re.search(r"1 x conv2d \[2, 24, 6, 4\]: \w*Error: ", check(0))


@torch.no_grad()
def test_too_many(monkeypatch):
    """Then the network runs as it came, with the reason."""
    monkeypatch.setattr("diffusion.planner.faults.MAX_FAULTS", 1)
    wrapped = failing(layout.convolution_arguments, lambda image, packed, out, **_: True)
    monkeypatch.setattr(layout, "convolution_arguments", wrapped)
    network = Blocks().eval()
    diffusion.accelerate(network)(torch.randn(2, 16, 8, 6))
    assert "not planned: OverflowError: it is 24 wide" in network.report()
