"""accelerate: modules that a planner could easily get wrong equal themselves, planned or not."""

import copy
import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import diffusion
from diffusion.planner import accelerated_forward
from diffusion.planner import weights as planner_weights
from helpers.native import requires_native

pytestmark = requires_native


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    """Plans the small networks of these tests as large ones are planned."""
    monkeypatch.setattr(planner_weights, "SMALL_NETWORK", 0)


class Function(nn.Module):
    """A module with some layers, whose forward is a function of them and of x."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.function(self, x)


def keywords(m, x):
    q, k, v = m.q(x), m.k(x), m.v(x)
    return F.scaled_dot_product_attention(query=q, value=v, key=k)


def norm_by_keywords(m, x):
    return torch.group_norm(x, 4, bias=m.norm.bias, weight=m.norm.weight, eps=1e-5)


def bool_mask(m, x):
    mask = x > 0
    mask &= x < 1
    return m.conv(x * mask)


def twice_a_mask(m, x):
    mask = (x > 0) * 1
    return m.conv(x * (mask + mask))


def as_integers(m, x):
    return m.conv(x) + (x.view(torch.int32) % 2)


def linear(*sizes):
    torch.manual_seed(sum(sizes))
    return nn.Linear(*sizes)


def conv(*sizes, **options):
    torch.manual_seed(sum(sizes))
    return nn.Conv2d(*sizes, **options)


def norm(module):
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


POSITION = torch.linspace(-1, 1, 8).view(1, 8, 1)
CASES = {
    "attention by keywords": (
        Function(keywords, q=linear(8, 8), k=linear(8, 8), v=linear(8, 8)),
        (2, 3, 5, 8),
    ),
    "a norm by keywords": (Function(norm_by_keywords, norm=norm(nn.GroupNorm(4, 8))), (2, 8, 5, 5)),
    "a mask in place": (Function(bool_mask, conv=conv(8, 8, 1)), (2, 8, 5, 5)),
    "a mask as numbers": (Function(twice_a_mask, conv=conv(8, 8, 1)), (2, 8, 5, 5)),
    "bits": (Function(as_integers, conv=conv(8, 8, 1)), (1, 8, 4, 4)),
    "rows joined": (
        Function(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=linear(8, 8), b=linear(8, 8)),
        (2, 3, 5, 8),
    ),
    "norms joined": (
        Function(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=nn.LayerNorm(8), b=norm(nn.LayerNorm(8))),
        (2, 3, 5, 8),
    ),
    "a linear map of columns": (
        Function(lambda m, x: m.conv(x) + m.lin(x), conv=conv(8, 8, 3, padding=1), lin=linear(6, 6)),
        (2, 8, 6, 6),
    ),
    "half the size, as rows": (
        Function(
            lambda m, x: m.conv(x).flatten(2).transpose(1, 2) * 0.5, conv=conv(8, 8, 3, stride=2, padding=1)
        ),
        (2, 8, 8, 6),
    ),
    "doubled, as rows": (
        Function(
            lambda m, x: (
                m.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")).flatten(2).transpose(1, 2) * 0.5
            ),
            conv=conv(8, 8, 3, padding=1),
        ),
        (2, 8, 4, 6),
    ),
    "lengths up to one": (
        Function(lambda m, x: m.conv(x / x.norm(dim=1, keepdim=True).clamp(min=3.0)), conv=conv(8, 8, 1)),
        (2, 8, 5, 5),
    ),
    "a wide guard": (
        Function(lambda m, x: m.conv(F.normalize(x, eps=3.0)), conv=conv(8, 8, 1)),
        (2, 8, 5, 5),
    ),
    "rows of positions": (
        Function(lambda m, x: m.conv(m.norm(x) + POSITION), norm=nn.GroupNorm(4, 8), conv=conv(8, 8, 1)),
        (1, 8, 8, 8),
    ),
    "two layouts of one map": (
        Function(
            lambda m, x: (m.conv(x), m.lin(x.permute(0, 2, 3, 1))), conv=conv(8, 8, 1), lin=linear(8, 8)
        ),
        (2, 8, 8, 8),
    ),
    "queries and keys of windows": (
        Function(
            lambda m, x: m.q(x) * m.k(x).sigmoid() + m.v(x), q=linear(8, 8), k=linear(8, 8), v=linear(8, 8)
        ),
        (2, 4, 5, 8),
    ),
    "norms of vectors": (nn.Sequential(linear(8, 8), norm(nn.LayerNorm(8)), nn.SiLU(), linear(8, 4)), (3, 8)),
    "images and positions merged": (
        Function(lambda m, x: m.lin(x).flatten(0, 1) * 0.5, lin=linear(8, 6)),
        (2, 5, 8),
    ),
    "strides": (
        Function(lambda m, x: m.conv(x).as_strided((4, 4), (4, 1)), conv=conv(8, 8, 1)),
        (1, 8, 4, 4),
    ),
    "an output that attention reads": (
        Function(
            lambda m, x: (
                F.scaled_dot_product_attention(
                    *m.qkv(x).unflatten(-1, (2, 4, 3)).movedim(-1, 0).transpose(2, 3).unbind(0)
                ),
                m.qkv(x),
            ),
            qkv=linear(8, 24),
        ),
        (2, 5, 8),
    ),
    "a pad before a single tap": (
        Function(lambda m, x: m.conv(F.pad(x, (0, 1, 0, 1))), conv=conv(8, 8, 1, stride=2)),
        (2, 8, 5, 5),
    ),
    "convolutions without padding": (
        Function(lambda m, x: m.b(F.silu(m.a(x))), a=conv(8, 70, 3), b=conv(70, 8, 3)),
        (2, 8, 9, 7),
    ),
    "doubled, without padding": (
        Function(lambda m, x: m.conv(F.interpolate(x, scale_factor=2.0)), conv=conv(8, 8, 3)),
        (2, 8, 4, 6),
    ),
    "half the size, without padding": (nn.Sequential(conv(8, 8, 3, stride=2)), (2, 8, 9, 6)),
    "an unscaled number": (
        Function(lambda m, x: m.conv(x) * torch.tensor(2.0) % 3, conv=conv(8, 8, 1)),
        (2, 8, 4, 4),
    ),
}
REASONS = {"strides": "it looks at the memory of tensors", "a mask in place": "it writes in place, by iand"}


def of(result) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_results_are_the_modules(name):
    module, shape = CASES[name]
    module.eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = of(module(x.clone()))
    diffusion.accelerate(module)
    for _ in range(2):
        for actual, wanted in zip(of(module(x.clone())), expected, strict=True):
            assert actual.dtype == wanted.dtype
            torch.testing.assert_close(actual, wanted, atol=1e-5 * wanted.abs().max().item(), rtol=1e-5)
    assert REASONS.get(name, "planned, exact") in module.report()
    diffusion.restore(module)


@dataclass
class Result:
    sample: Tensor


@torch.no_grad()
def test_unknown_results_are_not_planned():
    module = Function(lambda m, x: Result(m.conv(x)), conv=conv(8, 8, 1)).eval()
    x = torch.randn(1, 8, 4, 4)
    result = diffusion.accelerate(module)(x)
    assert type(result.sample) is Tensor
    torch.testing.assert_close(result.sample, module.conv(x))
    assert "it returns a Result" in module.report()


@torch.no_grad()
def test_what_a_module_keeps_is_its_own():
    def cached(m, x):
        if m.position is None:
            m.position = torch.arange(x.shape[1])[None, :, None, None] * 0.1
        m.seen.append(m.position)
        return m.conv(x + m.position)

    module = Function(cached, conv=conv(8, 8, 1), position=None, seen=[]).eval()
    x = torch.randn(1, 8, 4, 4)
    expected = module(x)
    module.position, module.seen[:] = None, []
    diffusion.accelerate(module)
    for count in (1, 2):
        torch.testing.assert_close(module(x), expected)
        assert type(module.position) is Tensor
        assert [type(value) for value in module.seen] == [Tensor] * count
    assert "changes its attributes" in module.report()


@torch.no_grad()
@pytest.mark.parametrize("holder", ["an attribute", "a list", "a closure"])
@pytest.mark.parametrize("by", [Tensor.mul_, lambda tensor, n: tensor.data.mul_(n)])
def test_tensors_of_all_kinds_are_followed(holder, by):
    held = torch.linspace(1, 2, 8).view(8, 1, 1)
    reads = {
        "an attribute": lambda m: m.scale,
        "a list": lambda m: m.scales[0],
        "a closure": lambda m: held,
    }[holder]
    module = Function(lambda m, x: m.conv(x * reads(m)), conv=conv(8, 8, 1), scale=held, scales=[held]).eval()
    x = torch.randn(1, 8, 4, 4)
    diffusion.accelerate(module)
    before = module(x)
    by(held, 2)
    actual = module(x)
    assert "planned, exact" in module.report()
    torch.testing.assert_close(actual, module.conv(x * held))
    assert not torch.equal(actual, before)


@torch.no_grad()
def test_numbers_stay_numbers():
    """Those that a network returns as it got them, or computes from them; others are given as tensors."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(8, 8, 1)

        def forward(self, x, t):
            return self.conv(x) * t, t, t + 1, {"constant": 3}

    module, x = Counts().eval(), torch.randn(1, 8, 4, 4)
    expected = [module(x, t) for t in (5, 0.5)]
    diffusion.accelerate(module)
    for wanted, t in zip(expected, (5, 0.5), strict=True):
        result = module(x, t)
        assert "planned, exact" in module.report()
        torch.testing.assert_close(result[0], wanted[0])
        assert result[1:] == wanted[1:]
        assert list(map(type, result[1:])) == [type(t), type(t), dict]


@torch.no_grad()
def test_reasons_do_not_add_up():
    module = Function(lambda m, x: m.conv(x) if x.sum() else x, conv=conv(8, 8, 1)).eval()
    diffusion.accelerate(module)
    for size in range(1, accelerated_forward.MAX_REASONS + 4):
        module(torch.zeros(1, 8, 1, size))
    assert len(module.forward._reasons) == accelerated_forward.MAX_REASONS
    assert "it reads the values" in module.report()


@torch.no_grad()
def test_an_unseen_change_is_in_no_new_plan():
    """A few numbers written through `.data` may stay unseen by a call, but not by one that packs weights."""
    module = nn.Sequential(conv(64, 64, 3, padding=1)).eval()
    diffusion.accelerate(module)
    small, large = torch.randn(1, 64, 2, 2), torch.randn(1, 64, 32, 32)
    module(small)
    module[0].weight.data[37, 21, 1, 1] += 1
    for x in (large, small):
        torch.testing.assert_close(module(x), module[0](x), rtol=1e-4, atol=1e-4)


def sorted_pixels(m, x):
    y = m.conv(x).flatten(2)
    return m.out(y.gather(2, y.argsort(2)).unflatten(2, x.shape[2:]))


@torch.no_grad()
def test_what_buffers_held_before_is_no_index():
    """A plan is laid out over the memory of another one, whose numbers are no positions."""
    network = Function(sorted_pixels, conv=nn.Conv2d(3, 8, 3, padding=1), out=nn.Conv2d(8, 3, 1))
    plain = copy.deepcopy(network.eval())
    diffusion.accelerate(network)
    for batch, side in ((2, 16), (4, 16), (2, 24), (3, 20), (8, 8)):
        x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(side))
        torch.testing.assert_close(network(x), plain(x), atol=1e-5, rtol=0)
        assert "not planned" not in network.report()


@torch.no_grad()
def test_plans_that_are_dropped_free_their_memory():
    network = Function(
        lambda m, x: m.out(m.conv(x)), conv=nn.Conv2d(3, 8, 3, padding=1), out=nn.Conv2d(8, 3, 1)
    )
    diffusion.accelerate(network.eval())
    seen = []
    for side in range(8, 8 + 4 * accelerated_forward.MAX_PLANS):
        network(torch.zeros(1, 3, side, side))
        pool = network.forward._thread_local.pool
        seen.append(weakref.ref(pool))
    del pool
    gc.collect()
    assert sum(ref() is not None for ref in seen[: -accelerated_forward.MAX_PLANS - 1]) == 0


@torch.no_grad()
def test_maps_of_one_tensor_in_two_shapes():
    """Linear maps of the same rows, of which one has them in another shape."""

    def run(m, x):
        rows = m.conv(x).permute(0, 2, 3, 1)
        return m.q(rows).exp().sum() + m.k(rows.reshape(2, 4, 9, 8)).sin().sum()

    m = Function(run, conv=nn.Conv2d(8, 8, 1), q=nn.Linear(8, 8), k=nn.Linear(8, 8)).eval()
    x = torch.randn(2, 8, 6, 6)
    expected = m(x)
    assert (diffusion.accelerate(m)(x) - expected).abs() <= 1e-5 * expected.abs()
    assert "planned" in m.report()
    assert "not planned" not in m.report()


@torch.no_grad()
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 1e-3, 1e-8])
def test_a_norm_times_a_small_constant(gamma, affine):
    """As in layer scale: the constant's relative accuracy is kept."""
    factor = nn.Parameter(gamma * torch.randn(1, 8, 1, 1))
    m = Function(lambda m, x: m.norm(m.conv(x)) * m.factor, conv=nn.Conv2d(8, 8, 1), factor=factor)
    m.norm = nn.GroupNorm(4, 8, affine=affine)
    if affine:
        nn.init.normal_(m.norm.weight)
        nn.init.normal_(m.norm.bias)
    x = torch.randn(2, 8, 6, 6)
    expected = copy.deepcopy(m).double()(x.double())
    actual = diffusion.accelerate(m.eval())(x)
    assert "planned, exact" in m.report()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize(
    "shape", [(), (1,), (1, 1, 1, 1), ("C", 1, 1), (1, "C", 1, 1), (1, 1, 8), (2, 1, 1, 1)]
)
@pytest.mark.parametrize("norm", ["group", "channels"])
def test_a_norm_times_a_constant(norm, shape, channels):
    """Constants for each channel, for all and for none of both, however they are broadcast."""
    factor = nn.Parameter(torch.randn([channels if n == "C" else n for n in shape]))
    m = Function(lambda m, x: m.norm(m.conv(x)) * m.factor, conv=nn.Conv2d(8, channels, 1), factor=factor)
    if norm == "group":
        m.norm = nn.GroupNorm(channels, channels, affine=False)
    else:
        m.norm = Function(lambda m, x: F.normalize(x, dim=1))
    x = torch.randn(2, 8, 8, 8)
    expected = copy.deepcopy(m).double()(x.double())
    actual = diffusion.accelerate(m.eval())(x)
    assert "planned, exact" in m.report()
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_epsilon_that_rms_norm_chooses(dtype):
    m = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8)).to(dtype).eval()
    x = (1e-2 * torch.randn(3, 5, 8)).to(dtype)
    expected = m(x).float()
    assert (diffusion.accelerate(m)(x).float() - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert "planned, exact" in m.report()


@torch.no_grad()
@pytest.mark.parametrize("write", ["masked_fill_", "pow_", "round_", "abs_", "floor_"])
def test_writes_in_place_that_are_computed_anew(write):
    def run(m, x):
        y = m.conv(x)
        given = {"masked_fill_": (x > 0, 3.0), "pow_": (2,)}.get(write, ())
        return getattr(y, write)(*given) * 2

    m = Function(run, conv=nn.Conv2d(8, 8, 1)).eval()
    x = torch.randn(2, 8, 6, 6)
    expected = m(x)
    assert torch.allclose(diffusion.accelerate(m)(x), expected, rtol=1e-5, atol=1e-5)
    assert "planned, exact" in m.report()
