"""Networks whose Python code reads, keeps or changes tensors, lists or objects: the results stay theirs."""

import functools
import math
from collections import OrderedDict, deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import diffusion
from diffusion.planner.comparison import difference
from helpers.native import requires_native

pytestmark = requires_native


class Network(nn.Module):
    """A convolution, and what a function does with it."""

    def __init__(self, function: Callable[..., Any], **attributes: Any):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)
        self.function = function
        vars(self).update(attributes)
        self.eval()

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


@pytest.fixture
def x():
    return torch.randn(2, 8, 4, 4, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def is_the_networks(network: Network, *args: Any) -> bool:
    expected = Network.forward(network, *args)
    return torch.allclose(network(*args), expected, rtol=1e-5, atol=1e-5)


NUMBERS = [
    3,
    2.5,
    torch.tensor(3),
    torch.tensor(3, dtype=torch.int8),
    torch.tensor(2.5).double(),
    torch.tensor(2.5),
]


@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize(
    "read",
    [int, float, math.sqrt, lambda t: 1.0 if t else 2.0, lambda t: sum(range(int(t))), lambda t: t],
    ids=["int", "float", "sqrt", "if", "range", "itself"],
)
def test_code_that_reads_a_number(read, number, x):
    network = diffusion.accelerate(Network(lambda m, x, t: m.conv(x) * read(t)))
    for factor in (1, 2, 0):
        assert is_the_networks(network, x, number * factor)


@pytest.mark.parametrize(
    "factor",
    [
        lambda t: 2.0**-t,
        lambda t: 2.0 if isinstance(t, float) else 3.0,
        lambda t: 2.0 if type(t) in (int, float) else 3.0,
        lambda t: {1: 2.0}.get(t, 1.0),
        lambda t: len(str(t)),
        lambda t: 3 if hasattr(t, "shape") else 2,
    ],
)
def test_code_that_takes_a_number_for_one(factor, x):
    network = diffusion.accelerate(Network(lambda m, x, t: m.conv(x) * factor(t)))
    assert is_the_networks(network, x, 1)


def test_the_backend_with_a_float_that_changes(x):
    from diffusion.planner.compile_backend import fused_diffusion

    network = Network(lambda m, x, sigma: m.conv(x) * sigma)
    compiled = torch.compile(network, backend=fused_diffusion)
    for sigma in (0.5, 1.5, 2.5):
        with torch.no_grad():
            assert torch.allclose(compiled(x, sigma), network(x, sigma), atol=1e-5)


@torch.no_grad()
def test_a_cache_outside_of_the_network_gets_tensors_with_data(x):
    @functools.lru_cache
    def positions(n: int) -> Tensor:
        return torch.arange(n).float()

    one, other = (Network(lambda m, x: m.conv(x) + positions(x.shape[-1])) for _ in range(2))
    diffusion.accelerate(one)
    assert is_the_networks(one, x)
    assert "planned, exact" in one.report()
    assert type(positions(4)) is Tensor
    assert type(other(x)) is Tensor
    assert is_the_networks(one, x[:1])


@torch.no_grad()
def test_a_cache_of_parametrised_weights_gets_tensors_with_data(x):
    network = Network(lambda m, x: m.conv(x))
    parametrizations.weight_norm(network.conv)
    diffusion.accelerate(network)
    with parametrize.cached():
        assert is_the_networks(network, x)
        assert type(network.conv.weight) is Tensor
        assert is_the_networks(network, x[:1])


@torch.no_grad()
@pytest.mark.parametrize("place", ["a list elsewhere", "an attention processor"])
def test_kept_feature_maps_are_those_of_each_call(place, x):
    class Processor:
        def __init__(self, kept: list[Tensor]):
            self.kept = kept

        def __call__(self, y: Tensor) -> Tensor:
            self.kept.append(y)
            return y

    kept: list[Tensor] = []
    if place == "a list elsewhere":
        network = Network(lambda m, x: (kept.append(m.conv(x)), kept[-1] * 2)[1])
    else:
        network = Network(lambda m, x: m.processor(m.conv(x)) * 2, processor=Processor(kept))
    diffusion.accelerate(network)
    for _ in range(3):
        network(x)
    assert "not planned: it keeps a tensor that it computes" in network.report()
    assert all(torch.equal(y, network.conv(x)) for y in kept if type(y) is Tensor)
    assert sum(type(y) is Tensor for y in kept) == 3
    if place == "an attention processor":
        assert len(kept) == 3


@torch.no_grad()
@pytest.mark.parametrize("kind", ["object", "namespace", "within", "deque", "ordered", "shape"])
def test_changes_beyond_attributes_are_noticed(kind, x):
    class Settings:
        def __init__(self) -> None:
            self.scale, self.within = 2.0, SimpleNamespace(scale=2.0)

    holders: dict[str, Any] = {
        "object": Settings(),
        "namespace": SimpleNamespace(scale=2.0),
        "within": Settings(),
        "deque": {"a": deque([2.0])},
        "ordered": [OrderedDict(scale=2.0)],
        "shape": None,
    }
    scale_of: dict[str, Callable[[Any], float]] = {
        "object": lambda held: held.scale,
        "namespace": lambda held: held.scale,
        "within": lambda held: held.within.scale,
        "deque": lambda held: held["a"][0],
        "ordered": lambda held: held[0]["scale"],
        "shape": lambda held: 1.0,
    }
    change: dict[str, Callable[[Network], Any]] = {
        "object": lambda m: setattr(m.held, "scale", 5.0),
        "namespace": lambda m: setattr(m.held, "scale", 5.0),
        "within": lambda m: setattr(m.held.within, "scale", 5.0),
        "deque": lambda m: m.held["a"].__setitem__(0, 5.0),
        "ordered": lambda m: m.held[0].__setitem__("scale", 5.0),
        "shape": lambda m: [setattr(p, "data", p.data[:4]) for p in m.conv.parameters()],
    }
    network = Network(lambda m, x: m.conv(x) * scale_of[kind](m.held), held=holders[kind])
    diffusion.accelerate(network)
    assert is_the_networks(network, x)
    assert "planned, exact" in network.report()
    change[kind](network)
    assert is_the_networks(network, x)
    assert "planned, exact" in network.report()


@torch.no_grad()
@pytest.mark.parametrize(
    "read", [lambda t: t.item(), lambda t: t.tolist(), lambda t: float(t.numpy()), int, bool]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_a_tensor_elsewhere_that_is_read_is_watched(dtype, read, x):
    held = torch.tensor(0, dtype=dtype)
    network = diffusion.accelerate(Network(lambda m, x: m.conv(x) * read(held)))
    for number in (0, 3, 5):
        held.fill_(number)
        assert is_the_networks(network, x)
        assert "planned, exact" in network.report()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dictionary", "list"])
def test_arguments_that_the_network_fills(kind, x):
    def fill(m: Network, x: Tensor, given: Any) -> Tensor:
        y = m.conv(x)
        if kind == "list":
            given.append(y)
        else:
            given["y"] = y
        return y * 2

    network = diffusion.accelerate(Network(fill))
    for _ in range(2):
        given: Any = [] if kind == "list" else {}
        network(x, given)
        assert len(given) == 1
    assert "it changes a list or dictionary among its arguments" in network.report()


@torch.no_grad()
def test_running_statistics_are_updated(x):
    mean, variance = torch.zeros(8), torch.ones(8)
    network = Network(lambda m, x: F.batch_norm(m.conv(x), mean, variance, training=True))
    diffusion.accelerate(network)(x)
    assert "it writes in place, by batch_norm" in network.report()
    one = torch.zeros(8), torch.ones(8)
    F.batch_norm(network.conv(x), *one, training=True)
    assert torch.equal(mean, one[0])
    assert torch.equal(variance, one[1])


@pytest.mark.parametrize("place", ["a closure", "a list"])
def test_gradients_of_tensors_that_are_no_parameters(place, x):
    factor = torch.tensor(2.0, requires_grad=True)
    network = Network(lambda m, x: m.conv(x) * (factor if place == "a closure" else m.held[0]), held=[factor])
    diffusion.accelerate(network.requires_grad_(False))
    network(x).sum().backward()
    assert "a gradient is wanted" in network.report()
    assert torch.allclose(factor.grad, network.conv(x).sum())
    with torch.no_grad():
        network(x)
    assert "planned, exact" in network.report()


@torch.no_grad()
def test_a_number_is_returned_as_it_was_given(x):
    network = diffusion.accelerate(Network(lambda m, x, t: (m.conv(x) * t, t)))
    assert isinstance(network(x, torch.tensor(5))[1], Tensor)
    assert network(x, 5)[1] == 5
    assert not isinstance(network(x, 5)[1], Tensor)


@torch.no_grad()
def test_nothing_of_the_network_is_written_and_nothing_drawn_while_it_is_traced(x):
    network = Network(lambda m, x: m.conv(x) + m.count.add_(1), count=torch.zeros(1))
    diffusion.accelerate(network)(x)
    assert network.count.item() == 1
    drawing = Network(lambda m, x: m.conv(x) + torch.randn(1))
    torch.manual_seed(0)
    expected = [drawing(x) for _ in range(2)]
    torch.manual_seed(0)
    diffusion.accelerate(drawing)
    assert torch.equal(drawing(x), expected[0])
    assert torch.equal(drawing(x), expected[1])
    assert "it draws random numbers, by randn" in drawing.report()


@torch.no_grad()
def test_a_plan_with_another_result_is_given_up(x, monkeypatch):
    from diffusion.planner.plan import Plan

    evaluate = Plan.evaluate
    monkeypatch.setattr(Plan, "evaluate", lambda self, tensors: [2 * y for y in evaluate(self, tensors)])
    network = diffusion.accelerate(Network(lambda m, x: m.conv(x)))
    for _ in range(2):
        assert is_the_networks(network, x)
        assert "a plan gives another result, further off than rounding gives" in network.report()


def test_differences():
    a = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert difference(a, a * (1 + 1e-4), narrow=False) is None
    assert difference(a, a.roll(1), narrow=True) is not None
    assert difference(a, a * 1.05, narrow=False) is not None
    assert difference(a, a * 1.05, narrow=True) is None
    assert difference(1e30 * a, 1e30 * a, narrow=False) is None
    assert difference(a, a.double(), narrow=False) is not None
    assert difference(a, a[:10], narrow=False) is not None
    assert difference((a, 1), (a, 2), narrow=False) is not None
    assert difference([a], (a,), narrow=False) is not None
    assert difference(a.argsort(), a.argsort().flip(0), narrow=False) is not None
    assert difference(a > 0, a < 0, narrow=True) is not None
    infinite = a.clone()
    infinite[3] = math.inf
    assert difference(infinite, infinite, narrow=False) is None
    assert difference(a, infinite, narrow=False) is not None


@torch.no_grad()
@pytest.mark.parametrize("write", ["setitem", "add_", "iadd", "copy_"])
def test_a_tensor_of_the_network_that_gets_what_depends_on_the_arguments(write, x):
    """Its numbers are not known while the network is traced, though it began as zeros."""

    def run(m: Network, x: Tensor) -> Tensor:
        mask, mean = torch.zeros(len(x)), x.mean((1, 2, 3))
        if write == "setitem":
            mask[:] = mean
        elif write == "iadd":
            mask += mean
        else:
            getattr(mask, write)(mean)
        y = m.conv(x)
        return y * 2 if mask.sum() > 0 else y

    network = diffusion.accelerate(Network(run))
    for given in (-x.abs(), x.abs()):
        assert is_the_networks(network, given)

    def place(m: Network, x: Tensor) -> Tensor:
        padded = torch.zeros(len(x), 8, 6, 6)
        padded[:, :, 1:5, 1:5] = m.conv(x)
        return padded * 2

    assert is_the_networks(padding := diffusion.accelerate(Network(place)), x)
    assert "planned, exact" in padding.report()


@pytest.mark.parametrize("use", ["norm", "exp", "sibling"])
def test_gradients_of_constants_that_are_folded(use, x):
    factor = torch.full((1, 8, 1, 1), 2.0, requires_grad=True)
    weight = torch.randn(8, 8, requires_grad=True)
    norm = nn.GroupNorm(4, 8).requires_grad_(False)

    def run(m: Network, x: Tensor) -> Tensor:
        y = m.conv(x)
        if use == "norm":
            return norm(y) * factor
        if use == "exp":
            return y * factor.exp()
        rows = y.permute(0, 2, 3, 1)
        return F.linear(rows, weight) + F.linear(rows, weight.detach()).sin()

    network = Network(run).requires_grad_(False)
    diffusion.accelerate(network)
    for _ in range(2):
        assert network(x).requires_grad


@torch.no_grad()
def test_batch_norm_without_statistics_of_its_own(x):
    norm = nn.BatchNorm2d(8, track_running_stats=False).eval()
    network = diffusion.accelerate(Network(lambda m, x: norm(m.conv(x))))
    assert is_the_networks(network, x)
    assert "planned, exact" in network.report()


@torch.no_grad()
def test_a_module_that_changes_before_every_call(x):
    network = diffusion.accelerate(
        Network(lambda m, x: m.conv(x) * m.held.scale, held=SimpleNamespace(scale=0.0))
    )
    for scale in range(12):
        network.held.scale = float(scale)
        assert is_the_networks(network, x)
    assert "it has changed before each of the last" in network.report()
    for _ in range(2):
        network(x)
    assert "planned, exact" in network.report()


@torch.no_grad()
def test_modules_of_other_objects_do_not_count(x):
    """Such as those of a pipeline: neither their hooks nor their weights."""
    other = nn.Linear(2, 2)
    other.register_forward_hook(lambda *_: None)
    network = diffusion.accelerate(Network(lambda m, x: m.conv(x), held=SimpleNamespace(other=other)))
    network(x)
    assert "planned, exact" in network.report()


@torch.no_grad()
def test_attributes_that_cannot_be_compared(x):
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise TypeError("no")

    network = diffusion.accelerate(Network(lambda m, x: m.conv(x), held=SimpleNamespace(odd=Odd())))
    for _ in range(2):
        assert is_the_networks(network, x)
        network.held.odd = Odd()


@torch.no_grad()
def test_whole_numbers_that_rounding_changes(x):
    """Pixels of a decoder in bfloat16 may differ by one."""
    network = Network(lambda m, x: (30 * m.conv(x)).round().to(torch.int16)).bfloat16()
    diffusion.accelerate(network)(x.bfloat16())
    assert "planned, exact" in network.report()


@torch.no_grad()
def test_kept_arguments_are_those_of_each_call(x):
    kept: list[Tensor] = []
    network = Network(lambda m, x: (kept.append(x), m.conv(x) * 2)[1])
    diffusion.accelerate(network)
    for _ in range(3):
        network(x)
    assert sum(y is x for y in kept) == 3
    assert "not planned: it keeps an argument" in network.report()


@torch.no_grad()
def test_a_plan_that_fails_is_given_up(x):
    """Its outputs are dense."""
    network = Network(lambda m, x: m.conv(x).flatten(1).to_sparse())
    expected = network(x)
    diffusion.accelerate(network)
    assert torch.equal(network(x).to_dense(), expected.to_dense())
    assert "not planned: " in network.report()
