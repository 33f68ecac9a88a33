"""The report of a plan: FLOPs as PyTorch counts them, and a line for each call."""

import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion
from helpers.diffusers_unets import conditional, of_conditional, of_unet2d, unet2d
from helpers.native import requires_native

diffusers = pytest.importorskip("diffusers")
pytestmark = requires_native


def wide() -> torch.nn.Module:
    return unet2d(sample_size=32, block_out_channels=(32, 64))


def of_wide(batch: int) -> dict[str, torch.Tensor]:
    return of_unet2d(batch, (32, 32))


@torch.no_grad()
@pytest.mark.parametrize(("make", "inputs"), [(wide, of_wide), (conditional, of_conditional)])
def test_flops_are_those_that_pytorch_counts(make, inputs):
    network, given = make(), inputs(2)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it counts no fused one
        network(**given)
    diffusion.accelerate(network)(**given)
    table = network.report(calls=True)
    found = sum(float(number) for number in re.findall(r"([\d.]+) MFLOP", table))
    calls = len(re.findall(r"MFLOP", table))
    assert abs(found - counter.get_total_flops() / 1e6) <= 0.05 * calls  # each line is rounded to 0.1
    total = float(re.search(r"([\d.]+) GFLOP", table).group(1))
    assert abs(total - counter.get_total_flops() / 1e9) <= 0.005


@torch.no_grad()
def test_a_table_has_a_line_for_each_call():
    network = diffusion.accelerate(wide())
    network(**of_wide(1))
    summary, table = network.report(), network.report(calls=True)
    assert table.startswith(summary)
    calls = int(re.search(r"(\d+) calls", summary).group(1))
    assert len(table.splitlines()) - len(summary.splitlines()) == calls
    assert "3x3; norm, SiLU before; sum" in table
    assert "3x3; stride 2" in table


@torch.no_grad()
def test_memory_is_that_of_the_plan():
    network = diffusion.accelerate(wide())
    network(**of_wide(1))
    packed = float(re.search(r"([\d.]+) MB of packed weights", network.report()).group(1)) * 1e6
    originals = sum(parameter.nbytes for parameter in network.parameters())
    assert originals <= packed <= 4 * originals
    network(**of_wide(2))  # another shape reads the same weights
    again = float(re.search(r"([\d.]+) MB of packed weights", network.report()).group(1)) * 1e6
    assert again <= 1.5 * packed
