"""Released weights: they leave memory, and everything still works on them."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch import nn

import diffusion
from diffusion.planner.release import ReleasedWeights
from helpers.native import requires_native
from helpers.processes import start_python


def network(channels: int = 16) -> nn.Module:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
    return nn.Sequential(*convolutions, nn.GroupNorm(4, channels), nn.SiLU()).eval()


def test_parameters_stay_what_they_are():
    module = network()
    module[1].to(memory_format=torch.channels_last)
    module.bfloat16()[2].float()
    before = copy.deepcopy(module.state_dict())
    parameters = list(module.parameters())
    released = ReleasedWeights(module)
    assert released.bytes >= sum(p.nbytes for p in parameters)
    assert all(map(lambda a, b: a is b, module.parameters(), parameters))
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        module[0].weight.add_(1)
    released.leave_memory()  # what was written is in the file
    assert torch.equal(module[0].weight, before["0.weight"] + 1)


def test_shared_weights_stay_shared():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = nn.Parameter(module[0].weight.detach().t())
    ReleasedWeights(module)
    with torch.no_grad():
        module[0].weight.zero_()
    assert not module[1].weight.any()


def test_weights_that_overlap_stay_shared():
    """Also where PyTorch has two storages for the same memory, as of two arrays of NumPy, or a buffer's."""
    numbers = np.ones(24, dtype=np.float32)
    module = nn.Module()
    module.first, module.second, module.third = (
        nn.Parameter(torch.from_numpy(numbers[start : start + 8])) for start in (0, 4, 16)
    )
    module.register_buffer("fourth", torch.from_numpy(numbers[20:]))
    module.alone = nn.Parameter(torch.ones(16))
    assert ReleasedWeights(module).bytes == module.alone.nbytes
    with torch.no_grad():
        module.first.zero_()
        module.third.zero_()
    assert module.second.tolist() == [0] * 4 + [1] * 4
    assert not module.fourth.any()


@requires_native
@torch.no_grad()
def test_results_are_those_of_the_module():
    module, x = network(), torch.randn(2, 16, 8, 8)
    expected = copy.deepcopy(module).double()(x.double())
    diffusion.accelerate(module, release_weights=True)
    for _ in range(2):
        assert (module(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    module[0].weight.mul_(2)
    expected = copy.deepcopy(diffusion.restore(module)).double()(x.double())
    diffusion.accelerate(module)
    assert (module(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


MEMORY = """
import torch
from torch import nn
import diffusion

def resident():  # bytes
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

module = nn.Sequential(*(nn.Conv2d(1024, 1024, 1) for _ in range(12))).eval()
x = torch.zeros(1, 1024, 2, 2)
with torch.no_grad():
    diffusion.accelerate(nn.Conv2d(8, 8, 1).eval())(x[:, :8])  # a first plan imports what planning needs
    module(x)
    before = resident()
    diffusion.accelerate(module, release_weights=True)
    released = resident()
    module(x)
    module(x)
    assert "planned, exact" in module.report(), module.report()
    print(before - released, resident() - released)
"""


@pytest.mark.slow
@requires_native
@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
def test_memory_falls_by_the_weights():
    process = start_python(MEMORY)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    freed, added = map(int, output.split())
    size = 12 * 1024 * 1024 * 4
    assert freed >= 0.9 * size
    assert added <= 2 * size  # the packed weights: in int8 limbs three bytes of four, at most float32
