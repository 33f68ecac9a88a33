"""The backend of torch.compile: networks equal themselves as they came, and their graphs are planned."""

import copy
import functools
from importlib import metadata

import pytest
import torch
from torch import Tensor, nn

from diffusion.planner import accelerated_forward
from diffusion.planner import weights as planner_weights
from diffusion.planner.compile_backend import fused_diffusion
from helpers.native import requires_native

pytestmark = requires_native
INSTALLED = "fused_diffusion" in metadata.entry_points(group="torch_dynamo_backends").names


class Block(nn.Module):
    """A small network with a convolution after a norm, a residual, a buffer and a linear map."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.embed = nn.GroupNorm(4, 16), nn.Linear(8, 16)
        self.register_buffer("offset", torch.randn(16, 1, 1))

    def forward(self, x, embedding):
        h = self.first(x) + self.offset
        shift = self.embed(embedding)[:, :, None, None]
        return h + self.second(nn.functional.silu(self.norm(h + shift)))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(planner_weights, "SMALL_NETWORK", 0)
    torch._dynamo.reset()


@pytest.fixture
def reasons(monkeypatch):
    """Why calls were not planned, "" for one that was."""
    seen = []
    call = accelerated_forward.AcceleratedForward.__call__

    @functools.wraps(call)
    def noted(self, *args, **kwargs):
        result = call(self, *args, **kwargs)
        seen.append(self._last)
        return result

    monkeypatch.setattr(accelerated_forward.AcceleratedForward, "__call__", noted)
    return seen


def arguments(batch: int = 2, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 3, size, size, generator=generator), torch.randn(batch, 8, generator=generator)


def close(actual: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert actual.dtype == torch.float32
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def exact(network: Block, given: tuple[Tensor, ...]) -> Tensor:
    return copy.deepcopy(network).double()(*(value.double() for value in given))


@pytest.mark.skipif(not INSTALLED, reason="the name belongs to the installed package")
def test_pytorch_finds_the_backend_by_name():
    assert "fused_diffusion" in torch._dynamo.list_backends()
    network = Block().eval()
    compiled = torch.compile(network, backend="fused_diffusion")
    with torch.no_grad():
        close(compiled(*arguments()), exact(network, arguments()))


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_outputs_are_the_networks(precision, reasons):
    network = Block().eval()
    compiled = torch.compile(network, backend=fused_diffusion, options={"precision": precision})
    with torch.no_grad():
        for batch, size in ((2, 12), (2, 12), (3, 12), (1, 9)):
            given = arguments(batch, size)
            close(compiled(*given), exact(network, given), 1e-5 if precision == "exact" else 0.03)
    assert reasons == [""] * 4


def test_changed_weights_count(reasons):
    network = Block().eval()
    compiled = torch.compile(network, backend=fused_diffusion)
    with torch.no_grad():
        compiled(*arguments())
        network.first.weight.mul_(2)
        network.offset.add_(1)
        close(compiled(*arguments()), exact(network, arguments()))
        network.second.weight = nn.Parameter(torch.randn_like(network.second.weight))
        close(compiled(*arguments()), exact(network, arguments()))
    assert reasons == [""] * 3


def test_graph_breaks_give_plans_of_their_own(reasons):
    network = Block().eval()

    def broken(x, embedding):
        h = network(x, embedding)
        torch._dynamo.graph_break()
        return nn.functional.conv2d(h, network.second.weight, padding=1)

    compiled = torch.compile(broken, backend=fused_diffusion)
    with torch.no_grad():
        close(compiled(*arguments()), broken(*arguments()))
    assert reasons == ["", ""]


def test_gradients_flow(reasons):
    network = Block().eval()
    compiled = torch.compile(network, backend=fused_diffusion)
    compiled(*arguments()).sum().backward()
    found = network.first.weight.grad.clone()
    network.zero_grad()
    network(*arguments()).sum().backward()
    torch.testing.assert_close(found, network.first.weight.grad)
    assert "gradient" in reasons[0]


def test_nonsense():
    with pytest.raises(ValueError, match="precision must be one of exact, fast"):
        fused_diffusion(torch.fx.symbolic_trace(nn.Identity()), [], options={"precision": "half"})
    with pytest.raises(ValueError, match="not speed"):
        fused_diffusion(torch.fx.symbolic_trace(nn.Identity()), [], options={"speed": 1})
