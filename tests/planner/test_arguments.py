"""Arguments of an accelerated module: numbers, tensors given twice, and many shapes in turn."""

import copy
import gc
import math

import pytest
import torch
from torch import nn

import diffusion
from diffusion.planner.accelerated_forward import CALLS_OF_PLAN, MAX_PLANS
from helpers.native import requires_native

pytestmark = requires_native


class Network(nn.Module):
    def __init__(self, function, channels=8):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(channels, channels, 1)

    def forward(self, *args):
        return self.function(self, *args)


def accelerated(function, channels=8):
    """A network, and the same one planned."""
    torch.manual_seed(0)
    network = Network(function, channels).eval()
    return network, diffusion.accelerate(copy.deepcopy(network))


@torch.no_grad()
@pytest.mark.parametrize("value", [0.9999, 0.9999999, 1 - 1e-9])
def test_numbers_are_computed_in_float64(value):
    """1 - 0.9999, of the first step of DDPM's linear schedule, has four digits in float32."""
    network, planned = accelerated(lambda m, x, alpha_bar: m.conv(x) / (1 - alpha_bar) ** 0.5)
    x = torch.randn(2, 8, 6, 6)
    planned(x, 0.5)
    expected = copy.deepcopy(network).double()(x.double(), value)
    assert (planned(x, value) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert "planned, exact" in planned.report()


def scaled_number(m, x, t):
    return m.conv(x) + (t if torch.is_tensor(t) else 1000 * t)


@torch.no_grad()
@pytest.mark.parametrize("values", [(0.0, 0.5, 0.25), (-0.0, 1.0), (0, 3, 2)])
def test_a_number_is_not_taken_for_a_tensor(values):
    """A plan of a tensor in the number's place gives the same for 0, and another result for others."""
    network, planned = accelerated(scaled_number)
    x = torch.randn(1, 8, 4, 4)
    for value in values:
        torch.testing.assert_close(planned(x, value), network(x, value))


@torch.no_grad()
def test_the_sign_of_zero():
    network, planned = accelerated(lambda m, x, t: m.conv(x) * math.copysign(1, t))
    x = torch.randn(1, 8, 4, 4)
    for value in (0.0, -0.0, 0.0):
        torch.testing.assert_close(planned(x, value), network(x, value))


@torch.no_grad()
@pytest.mark.parametrize("value", [2**31, 2**63, 2**100])
def test_integers_that_no_tensor_holds(value):
    network, planned = accelerated(lambda m, x, t: m.conv(x) * (t / 2**100))
    x = torch.randn(1, 8, 4, 4)
    planned(x, 5)
    torch.testing.assert_close(planned(x, value), network(x, value))


@torch.no_grad()
def test_a_network_that_reads_many_numbers_is_not_planned_for_each():
    def run(m, x, sigma):
        run.calls += 1
        return m.conv(x) + math.log(sigma)

    run.calls = 0
    network, planned = accelerated(run)
    x, sigmas = torch.randn(1, 8, 4, 4), [0.1 + i for i in range(30)]
    for sigma in sigmas:
        torch.testing.assert_close(planned(x, sigma), network(x, sigma))
    assert f"it reads numbers among its arguments, and {MAX_PLANS} values" in planned.report()
    run.calls = 0
    for sigma in sigmas:
        planned(x, sigma)
    assert run.calls == len(sigmas) - MAX_PLANS  # no traces
    planned(x, sigmas[0])
    assert "planned, exact" in planned.report()


@torch.no_grad()
def test_a_tensor_that_is_given_twice():
    network, planned = accelerated(lambda m, q, k: m.conv(q) * (1 if k is q else 2) + m.conv(k))
    x, y = torch.randn(2, 1, 8, 4, 4)
    for given in ((x, y), (x, x), (y, x), (y, y)):
        torch.testing.assert_close(planned(*given), network(*given))
        assert "planned, exact" in planned.report()


@torch.no_grad()
def test_more_shapes_than_plans():
    """Each is planned at its first call, and not at every later one; a shape that stays gets a plan soon."""
    network, planned = accelerated(lambda m, x: m.conv(x))
    maps = [torch.randn(1, 8, 4, 4 + i) for i in range(3 * MAX_PLANS)]
    plans = []
    for x in maps * 4:
        torch.testing.assert_close(planned(x), network(x))
        plans.append(vars(planned.forward._thread_local)["calls"] == 0)
    assert all(plans[: len(maps)])
    assert sum(plans[len(maps) :]) <= 3 * len(maps) // CALLS_OF_PLAN
    for _ in range(CALLS_OF_PLAN + 1):
        planned(maps[3])
    assert "planned, exact" in planned.report()


@torch.no_grad()
def test_tables_of_each_shape_leave_memory_with_their_plans():
    def run(m, x):
        positions = torch.arange(x.shape[3]).float() / x.shape[3]
        return m.conv(x + positions.sin())

    _, planned = accelerated(run)
    for width in range(8, 8 + 4 * MAX_PLANS):
        planned(torch.zeros(1, 8, 4, width))
    gc.collect()
    weights = planned.forward._weights
    assert len(weights._copies) + len(weights._passing) <= 2 * MAX_PLANS
