"""ModuleState sees what changes in a module, numbers that are written through `.data` included."""

import pytest
import torch
from torch import nn

from diffusion.kernels import _native
from diffusion.planner import state
from diffusion.planner.state import ModuleState
from helpers.native import requires_native


def make() -> nn.Module:
    module = nn.Sequential(
        nn.Conv2d(8, 70, 3), nn.BatchNorm2d(70), nn.Linear(300, 5, bias=False), nn.Linear(1, 1)
    )
    module[2].weight = nn.Parameter(torch.randn(300, 5).t())
    module.scale, module.tables = torch.ones(4), {"fine": [torch.zeros(3), torch.ones(1)]}
    module.hidden = [nn.Linear(2, 2)]  # which is no submodule
    return module.eval()


@torch.no_grad()
def in_place(module):
    module[0].weight[3, 4, 1, 1] += 1


def replaced(module):
    module[0].weight = nn.Parameter(module[0].weight.detach().clone())


def by_data(module):
    module[0].weight.data = module[0].weight.detach().clone()


def turned(module):
    module[2].weight.data = torch.randn(5, 300)


def another_attribute(module):
    module[1].eps = 0.5


def another_module(module):
    module[3] = nn.Identity()


def hooked(module):
    module[3].register_forward_hook(print)


def without_a_bias(module):
    module[3].bias = None


def plain_in_place(module):
    module.scale[2] = 5


def plain_replaced(module):
    module.scale = module.scale.clone()


def plain_replaced_by_an_equal_number(module):
    module.tables["fine"][1] = torch.ones(1)


def nested_in_place(module):
    module.tables["fine"][0].add_(1)


def hidden(module):
    module.hidden[0].bias = nn.Parameter(torch.ones(2))


CHANGES = [in_place, replaced, by_data, turned, another_attribute, another_module, hooked, without_a_bias]
CHANGES += [plain_in_place, plain_replaced, plain_replaced_by_an_equal_number, nested_in_place, hidden]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("whole", [False, True])
def test_changes(change, whole):
    module = make()
    seen = ModuleState(module)
    assert all(seen.holds(whole) for _ in range(2 * state.PARTS))
    change(module)
    assert not seen.holds(whole)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_without_the_library(change, monkeypatch):
    monkeypatch.setattr(_native, "CPP_MISSING", "there is none")
    module = make()
    seen = ModuleState(module)
    assert seen.holds()
    change(module)
    assert not seen.holds()


def every_number(module):
    tensors = (*module.parameters(), *module.buffers(), module.scale, module.tables["fine"][0])
    return [tensor for tensor in tensors if tensor.is_floating_point()]


@requires_native
def test_a_whole_weight_written_through_data():
    """The next call sees it, whichever part it compares."""
    for tensor in every_number(module := make()):
        for _ in range(3):
            seen = ModuleState(module)
            tensor.data.mul_(0.9).add_(1e-3)
            assert not seen.holds()


@requires_native
@pytest.mark.parametrize("where", [0, 100, 1499, -1])
def test_one_number_written_through_data(where):
    """The next whole comparison sees it, and one of PARTS others."""
    for tensor in every_number(module := make()):
        seen = ModuleState(module)
        numbers = tensor.data.as_strided((tensor.numel(),), (1,))
        numbers[where if where < len(numbers) else 0] += 1
        assert not seen.holds(whole=True)
        assert [seen.holds() for _ in range(state.PARTS)].count(False) > 0


@requires_native
def test_written_in_inference_mode():
    with torch.inference_mode():
        made = make()
        module = nn.Sequential(made, nn.Linear(3, 3))
    seen = ModuleState(module)
    assert seen.holds()
    with torch.inference_mode():
        module[1].weight.fill_(3)
    assert not seen.holds()


@requires_native
def test_two_numbers_that_trade_places():
    module = make()
    seen = ModuleState(module)
    numbers = module[0].weight.data.view(-1)
    numbers[[5, 6, 900]] = numbers[[6, 5, 900]]
    assert not seen.holds(whole=True)
    numbers[[5, 6]] = numbers[[6, 5]]
    assert seen.holds(whole=True)


@requires_native
def test_nan_is_equal_to_itself():
    module = make()
    module[0].weight.data.fill_(float("nan"))
    assert ModuleState(module).holds(whole=True)


def test_tensors_that_are_watched():
    module, held = make(), torch.zeros(3)
    seen = ModuleState(module)
    seen.watch([held, module[0].weight])
    assert seen.holds()
    held[1] = 1
    assert not seen.holds()


def test_a_module_within_a_list_that_is_around_it():
    """A change of the whole module is no change of a part."""
    whole = make()
    whole[3].whole = [whole]
    seen = ModuleState(whole[3])
    whole.scale.add_(1)
    assert seen.holds()
    whole[3].weight.data.add_(1)
    assert not seen.holds(whole=True)


@requires_native
def test_no_tensors():
    assert ModuleState(nn.ReLU()).holds()
    assert ModuleState(nn.ReLU()).holds(whole=True)


@requires_native
@pytest.mark.parametrize(("part", "parts"), [(-1, 4), (4, 4), (0, 0)])
def test_parts_that_are_none(part, parts):
    with pytest.raises(ValueError, match=r"part must be in 0\.\.parts-1"):
        _native.library().MemoryDigest([]).holds(part, parts)


@requires_native
@pytest.mark.parametrize("change", [torch.Tensor.neg_, lambda column: column.mul_(2), torch.Tensor.zero_])
@pytest.mark.parametrize("step", [1, 2, 8, 16])
def test_changes_of_many_numbers_do_not_cancel(change, step):
    """Each changes the same bits of many words."""
    for seed in range(20):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        seen = state.digest_of([weight])
        change(weight[:, 1::step])
        assert not seen.holds(0, 1)
