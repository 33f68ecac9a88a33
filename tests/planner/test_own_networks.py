"""accelerate: the package's own architectures, called with labels as their modules are."""

import copy

import pytest
import torch

import diffusion
from helpers.architectures import MODELS, batch_of
from helpers.native import requires_native

pytestmark = requires_native


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_plan_serves_and_gives_the_same(name):
    model = MODELS[name]()
    network, given = model.unet, batch_of(model, 2)
    wide = [value.double() if value.is_floating_point() else value for value in given]
    expected, plain = copy.deepcopy(network).double()(*wide), network(*given)
    actual = diffusion.accelerate(network)(*given)
    assert "not planned" not in network.report()
    error, allowed = ((y - expected).square().mean().sqrt() for y in (actual, plain))
    assert error <= max(2 * allowed, 1e-6 * expected.abs().max())
