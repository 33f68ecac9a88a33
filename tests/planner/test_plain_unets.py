"""accelerate: UNets in plain functions of PyTorch, as EDM and guided-diffusion write theirs."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import diffusion
from diffusion.planner import weights as planner_weights
from helpers.native import requires_native
from helpers.plain_unets import PooledUNet, ScaledUNet, small
from helpers.thinning import exhaustive_but

pytestmark = requires_native

NETWORKS = {
    "scaled": lambda: ScaledUNet(),
    "scaled_heads": lambda: ScaledUNet(heads=2),
    "scaled_modulated": lambda: ScaledUNet(scales=True),
    "scaled_filtered": lambda: ScaledUNet(filter=(1, 3, 3, 1)),
    "pooled": lambda: PooledUNet(),
    "pooled_heads_first": lambda: PooledUNet(split=False),
    "pooled_added": lambda: PooledUNet(scales=False),
}
# Functions on maps and sequences that no call of a compiled op takes in.
LEFT = {"scaled_filtered": {"conv2d", "conv_transpose2d"}}


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    """Plans the small networks of these tests as large ones are planned."""
    monkeypatch.setattr(planner_weights, "SMALL_NETWORK", 0)


def inputs(network: nn.Module, batch: int, size: tuple[int, int], dtype=torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, *size, generator=generator, dtype=torch.float32).to(dtype)
    if isinstance(network, ScaledUNet):
        return [x, (torch.arange(batch) + 1.0).to(dtype)]
    return [x, torch.arange(batch) * 100 + 7, torch.arange(batch) % 5]


def exact(network: nn.Module, given: list[Tensor]) -> Tensor:
    wide = [value.double() if value.is_floating_point() else value for value in given]
    return copy.deepcopy(network).double()(*wide)


def is_as_accurate(actual: Tensor, peer: Tensor, expected: Tensor) -> bool:
    error, allowed = ((y - expected).square().mean().sqrt() for y in (actual, peer))
    return bool(error <= 2 * allowed)


@torch.no_grad()
@pytest.mark.thinned
@pytest.mark.parametrize(("batch", "size"), [(1, (8, 8)), (2, (8, 12)), (5, (10, 6))])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_networks(name, batch, size):
    network = small(NETWORKS[name]())
    given = inputs(network, batch, size)
    expected = exact(network, given)
    actual = diffusion.accelerate(network)(*given)
    assert "planned, exact" in network.report()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", exhaustive_but(NETWORKS, default=list(NETWORKS)[::2]))
def test_fast_is_as_accurate_as_pytorch_in_bfloat16(name):
    network = small(NETWORKS[name]())
    given = inputs(network, 3, (8, 8))
    expected = exact(network, given)
    peer = copy.deepcopy(network).bfloat16()(*inputs(network, 3, (8, 8), torch.bfloat16))
    actual = diffusion.accelerate(network, precision="fast")(*given)
    assert "planned, fast" in network.report()
    assert is_as_accurate(actual, peer, expected)


@torch.no_grad()
@pytest.mark.thinned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["scaled", "scaled_heads", "pooled", "pooled_heads_first"])
def test_modules_in_sixteen_bits(name, dtype):
    network = small(NETWORKS[name]())
    expected = exact(network, inputs(network, 2, (8, 8)))
    network.to(dtype)
    given = inputs(network, 2, (8, 8), dtype)
    peer = network(*given)
    actual = diffusion.accelerate(network)(*given)
    assert "planned" in network.report()
    assert actual.dtype == dtype
    assert is_as_accurate(actual, peer, expected)


@cache
@torch.no_grad()
def planned(name: str) -> nn.Module:
    """The network after a call."""
    network = small(NETWORKS[name]())
    diffusion.accelerate(network)(*inputs(network, 3, (8, 8)))
    return network


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_everything_on_maps_is_fused(name):
    """Only functions of vectors, and of the images that come and go, stay calls of PyTorch."""
    network = planned(name)
    unfused = [line.split(" x ")[1].split(" [") for line in network.report().splitlines() if " x " in line]
    shapes = [(function, [int(n) for n in shape.rstrip("]").split(",")]) for function, shape in unfused]
    on_maps = {function for function, shape in shapes if len(shape) > 2 and shape[1] > 3 and shape[-1] > 1}
    assert on_maps == LEFT.get(name, set())


@torch.no_grad()
@pytest.mark.parametrize("name", ["scaled_heads", "pooled", "pooled_heads_first"])
def test_attention_reads_heads_in_place(name):
    """Neither queries, keys and values nor what attention gives are copied."""
    network = planned(name)
    report = network.report()
    assert "3 attentions" in report
    plan = network.forward._thread_local.last.plan
    copies = [call for call in plan.layout.calls if call[0].__name__ in ("store", "copy")]
    assert all(call[1][0].ndim <= 2 or call[1][0].shape[1] == 3 for call in copies)
