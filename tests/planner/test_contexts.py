"""accelerate: hooks of the module itself run, inference mode changes nothing, and Dynamo sees the module."""

import copy

import pytest
import torch
from torch import Tensor, nn

import diffusion
from helpers.native import requires_native

pytestmark = requires_native


class Network(nn.Module):
    """A norm and a convolution, with labels, a mask and a table of positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.conv = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, padding=1)
        self.embed = nn.Embedding(5, 8)
        self.register_buffer("positions", torch.randn(1, 8, 1, 6))

    def forward(self, x: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        h = (
            self.conv(nn.functional.silu(self.norm(x + self.positions)))
            + self.embed(labels)[:, :, None, None]
        )
        return h if mask is None else h.masked_fill(~mask[:, None], 0.0)


def given(batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 8, 5, 6, generator=generator)
    return x, torch.arange(batch) % 5, x[:, 0] > 0


def close(actual: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        network = copy.deepcopy(diffusion.restore(copy.deepcopy(module))).double()
        expected = network(inputs[0].double(), *inputs[1:])
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_hooks_of_the_module_itself_run():
    module, seen = Network().eval(), []
    diffusion.accelerate(module)
    module.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))
    module.register_forward_hook(lambda _, args, output: seen.append(output) or output + 1)
    x, labels, mask = given()
    actual = module(x, labels, mask)
    assert "planned, exact" in module.report()
    plain = Network().eval()
    torch.testing.assert_close(seen[0], plain(x * 2, labels, mask), rtol=1e-5, atol=1e-5)
    assert torch.equal(actual, seen[0] + 1)


@pytest.mark.parametrize("made_in", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_plans_serve_in_inference_mode_and_out_of_it(first, made_in):
    """Weights, inputs and the first call in one mode, later calls in both."""
    with made_in():
        module = Network().eval()
    diffusion.accelerate(module)
    with first():
        inputs = given()
        result = module(*inputs)
        assert "planned, exact" in module.report()
    close(result, module, inputs)
    for mode in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(module(*inputs), result)
            assert "planned, exact" in module.report()
    with made_in():
        module.conv.weight.mul_(2)
    with torch.no_grad():
        close(module(*inputs), module, inputs)


def test_each_batch_size():
    module = diffusion.accelerate(Network().eval())
    with torch.no_grad():
        for batch in range(1, 6):
            for inputs in (given(batch), given(batch)[:2]):
                close(module(*inputs), module, inputs)
                assert "planned, exact" in module.report()


@torch.no_grad()
def test_dynamo_captures_an_accelerated_module_whole():
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.SiLU()).eval()
    x = torch.randn(1, 4, 8, 8)
    expected = network(x)
    compiled = torch.compile(diffusion.accelerate(network), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)
