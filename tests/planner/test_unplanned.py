"""Networks that no plan can serve, and the reasons that are told."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import diffusion
from helpers.native import requires_native

pytestmark = requires_native


class Network(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(8, 8, 1)
        self.register_buffer("table", torch.ones(8, 1, 1))

    def forward(self, x):
        return self.function(self, x)


def in_bfloat16(m, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.conv(x)
    return m.conv(y.float())


UNPLANNED = {
    "autocast within": (in_bfloat16, "it enables autocast as it runs"),
    "half": (lambda m, x: m.conv(x).half().float(), "it rounds feature maps to 16 bits"),
    "a remainder": (lambda m, x: x + 100 * (x - x.bfloat16().float()) + m.conv(x), "it rounds feature maps"),
    "dropout in attention": (
        lambda m, x: F.scaled_dot_product_attention(m.conv(x), x, x, dropout_p=0.001),
        "it draws random numbers",
    ),
    "rrelu": (lambda m, x: F.rrelu(m.conv(x), 0.3, 0.301, training=True), "it draws random numbers"),
    "bernoulli": (lambda m, x: m.conv(x) * torch.empty(8, 1, 1).bernoulli_(), "it"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", UNPLANNED)
def test_results_and_random_numbers_are_the_modules(name):
    function, reason = UNPLANNED[name]
    network, x = Network(function).eval(), torch.randn(1, 8, 4, 4)
    planned = diffusion.accelerate(copy.deepcopy(network))
    results = []
    for module in (network, planned):
        torch.manual_seed(0)
        results.append([module(x) for _ in range(3)])
    assert all(map(torch.equal, *results))
    assert f"not planned: {reason}" in planned.report()


@torch.no_grad()
def test_a_network_without_parameters():
    network = nn.AvgPool2d(2).eval()
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(diffusion.accelerate(network)(x), F.avg_pool2d(x, 2))
    assert "it has no parameters" in network.report()


@torch.no_grad()
def test_a_call_that_fails():
    network = diffusion.accelerate(nn.Sequential(nn.Conv2d(8, 8, 1)).eval())
    with pytest.raises(RuntimeError, match="to have 8 channels"):
        network(torch.randn(1, 7, 4, 4))
    assert "the call of the module itself has failed" in network.report()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 8, 4, 4))])
def test_scripted_modules(make):
    with pytest.raises(ValueError, match="cannot plan a scripted module"):
        diffusion.accelerate(make(nn.Conv2d(8, 8, 1).eval()))


class Tuple(nn.Conv2d):
    """Its state for `copy` and `pickle` is a tuple."""

    def __getstate__(self):
        return "mine", dict(self.__dict__)

    def __setstate__(self, state):
        self.__dict__.update(state[1])


MODULES = {
    "a state of its own": lambda: Tuple(8, 8, 1),
    "torch.fx": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(8, 8, 1), nn.SiLU())),
}


@torch.no_grad()
@pytest.mark.parametrize("clone", [copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("name", MODULES)
def test_copies_run_themselves(name, clone):
    original = MODULES[name]().eval()
    x = torch.randn(1, 8, 4, 4)
    expected = original(x)
    planned = diffusion.accelerate(original)
    other = clone(planned)
    torch.testing.assert_close(other(x), expected)
    if "forward" in vars(other):
        assert vars(other)["forward"]._module is other
    assert vars(planned)["forward"]._module is planned
