"""Plans of small networks compute what the networks compute, whatever their graphs look like."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.kernels.ops.attention.library import attention_
from diffusion.kernels.ops.convolution.library import convolution_
from diffusion.kernels.ops.layer_norm.library import layer_norm_
from diffusion.kernels.ops.linear_attention.library import linear_attention_
from diffusion.planner import weights as planner_weights
from diffusion.planner.plan import Plan
from diffusion.planner.trace import Untraceable, trace
from diffusion.planner.weights import Weights
from helpers.native import requires_native

pytestmark = requires_native


@pytest.fixture(autouse=True)
def fast_kernels(monkeypatch):
    """Plans the small networks of these tests as large ones are planned."""
    monkeypatch.setattr(planner_weights, "SMALL_NETWORK", 0)


def plan_of(
    network: nn.Module,
    arguments: dict[str, Tensor],
    dtype: torch.dtype = torch.float32,
    weights: Weights | None = None,
) -> Plan:
    network.eval()
    meta = {name: (torch.empty_like(p, device="meta"), p.detach()) for name, p in network.named_parameters()}
    seen = {name: tensor for name, (tensor, _) in meta.items()}

    def run(**given: Tensor) -> object:
        return torch.func.functional_call(network, seen, kwargs=given)

    examples = {name: torch.empty_like(value, device="meta") for name, value in arguments.items()}
    graph, _ = trace(run, examples, meta)
    return Plan(graph, weights or Weights(list(network.parameters()), dtype))


def outputs_of(plan: Plan, arguments: dict[str, Tensor]) -> list[Tensor]:
    for buffer, value in zip(plan.inputs, arguments.values(), strict=True):
        buffer.copy_(value)
    plan.run()
    return [output.clone() for output in plan.outputs]


def conv(inputs: int, outputs: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


class Network(nn.Module):
    """Modules by name, and a function of them and x [2, 16, 8, 6]."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor, v: Tensor) -> object:
        return self.function(self, x, v)


def attend(net: Network, x: Tensor, heads: int = 2) -> Tensor:
    rows = x.flatten(2).transpose(1, 2)
    q, k, v = (f(rows).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (net.q, net.k, net.v))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return net.out(h).transpose(1, 2).reshape(x.shape)


def in_place(net: Network, x: Tensor, v: Tensor) -> Tensor:
    h = net.a(x)
    h += x
    h = F.silu(h, inplace=True)
    return net.b(h).mul_(2)


def items(net: Network, x: Tensor, v: Tensor) -> Tensor:
    """Parts of a tensor are written, as in sliced attention."""
    h = x.new_zeros(2, 48, 16)
    rows = net.a(x).flatten(2).transpose(1, 2)
    for i in range(2):
        h[i : i + 1] = rows[i : i + 1] * 2
    h[..., 0] = 3.0
    return net.a(h.transpose(1, 2).view(x.shape)) + x


def modulated(net: Network, x: Tensor, v: Tensor) -> Tensor:
    scale, shift = v.chunk(2, dim=1)
    h = net.norm(x) * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    return net.a(F.silu(h)) + net.b(x)


def shared_norm(net: Network, x: Tensor, v: Tensor) -> Tensor:
    """A norm that a convolution reads, and something else, too."""
    h = F.silu(net.norm(x + v[:, :16, None, None]))
    return net.a(h) + h.mean((2, 3), keepdim=True)


def skips(net: Network, x: Tensor, v: Tensor) -> Tensor:
    """Values that are concatenated twice, nested, and read between."""
    a, b = net.a(x), net.b(x)
    c = torch.cat([a, b], dim=1)
    d = torch.cat([net.c(c), a, a], dim=1)
    return net.d(torch.cat([d, c, x], dim=1)) + b


def two_outputs(net: Network, x: Tensor, v: Tensor) -> dict[str, Tensor]:
    h = net.a(x)
    return {"first": h, "second": net.b(h) + h, "vector": h.mean((2, 3)) + v[:, :16]}


def downs_and_ups(net: Network, x: Tensor, v: Tensor) -> Tensor:
    h = net.down(F.pad(x, (0, 1, 0, 1)))
    h = net.up(F.interpolate(net.strided(F.silu(net.norm(h))), scale_factor=2.0, mode="nearest"))
    return F.interpolate(h, size=(8, 6)) + F.interpolate(F.avg_pool2d(x, 2), scale_factor=2)


def not_known(net: Network, x: Tensor, v: Tensor) -> Tensor:
    h = net.grouped(x) + net.dilated(x)
    h = F.leaky_relu(h.roll(1, 2).flip(3), 0.1)
    weight = net.a.weight / net.a.weight.norm(dim=1, keepdim=True)  # depends on constants alone
    return F.conv2d(h, weight, net.a.bias, padding=1) * h.sigmoid()


def sequences(net: Network, x: Tensor, v: Tensor) -> Tensor:
    rows = x.permute(0, 2, 3, 1).reshape(2, 48, 16)
    h = F.gelu(net.first(F.layer_norm(rows, (16,), net.w, net.b)))
    rows = net.second(h) + rows
    value, gate = net.gated(rows).chunk(2, dim=-1)
    return (value * F.gelu(gate)).reshape(2, 8, 6, 16).permute(0, 3, 1, 2) + x


def cross_attend(net: Network, x: Tensor, v: Tensor) -> Tensor:
    """Queries of the image, keys and values of a text of eight positions."""
    rows, text = x.flatten(2).transpose(1, 2), v.view(2, 8, 4)
    q, k, v = net.q(rows), net.k(text), net.v(text)
    q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in (q, k, v))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return (net.out(h) + rows).transpose(1, 2).reshape(x.shape)


def activated(net: Network, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Activations of maps, of rows and of vectors, before and after a sum, and halves in the other order."""
    rows = F.gelu(net.a(x), approximate="tanh").flatten(2).transpose(1, 2)
    gates, values = net.gated(rows).chunk(2, dim=-1)
    tanh, others = net.gated(rows).chunk(2, dim=-1)
    rows = F.silu(net.first(rows)) + values * F.gelu(gates) + others * F.gelu(tanh, approximate="tanh")
    vector = F.silu(net.first(F.silu(net.vector(v)))) + net.vector(v)
    return rows.transpose(1, 2).reshape(x.shape) + vector[:, :, None, None], F.silu(vector)


def linear_on_maps(net: Network, x: Tensor, v: Tensor) -> Tensor:
    """Linear maps of [N, H, W, C], of another order of pixels, and of a vector."""
    a = net.first(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    b = net.first(x.permute(0, 3, 2, 1)).permute(0, 3, 2, 1)
    c = net.first(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(2, -1, 6, 8)
    return a + b + net.second(v)[:, :, None, None] + c.transpose(2, 3)


def times(net: Network, x: Tensor, v: Tensor) -> Tensor:
    h = (net.a(x) + x) / 2**0.5
    return 1 - 2 * net.b(h * 1.0) / 3 - (x - h)


def channel_norms(net: Network, x: Tensor, v: Tensor) -> Tensor:
    """Norms over the channels of each pixel, as networks write them."""
    g, b = net.g[:, None, None], net.b[:, None, None]
    scale, shift = v[:, :, None, None].chunk(2, dim=1)
    h = net.conv(x)
    h = F.silu(F.normalize(h, dim=1) * g * 16**0.5 * (scale + 1) + shift) + x
    mean, variance = h.mean(1, keepdim=True), h.var(1, unbiased=False, keepdim=True)
    h = (h - mean) / (variance + 1e-5).sqrt() * g + b + h
    mean, variance = h.mean(1, keepdim=True), h.var(1, correction=0, keepdim=True)
    h = (h - mean) * (variance + 1e-5).rsqrt() * g
    h = F.silu(h * h.pow(2).mean(1, keepdim=True).add(1e-3).rsqrt() + shift)
    centred = h - h.mean(1, keepdim=True)
    h = x + centred / ((centred * centred).mean(1, keepdim=True) + 1e-4) ** 0.5
    h = F.silu(h / torch.linalg.vector_norm(h, dim=1, keepdim=True).clamp(min=1e-12) * 2)
    rows = h.permute(0, 2, 3, 1)
    rows = rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return torch.cat([rows.permute(0, 3, 1, 2), h * net.b.norm()], dim=1)


def other_norms(net: Network, x: Tensor, v: Tensor) -> Tensor:
    """Norms that look like those over the channels of each pixel, but are not."""
    a = F.normalize(x, dim=2) + F.normalize(x, p=1) + F.normalize(x, dim=3).transpose(2, 3).reshape(x.shape)
    b = (x - x.mean((1, 2), keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
    c = (x - x.mean(1, keepdim=True)) * (a.var(1, correction=0, keepdim=True) + 1e-5).rsqrt()
    return net.conv(a + b + c * x.abs().sqrt())


def attend_linearly(net: Network, x: Tensor, tokens: int, by_einsum: bool) -> Tensor:
    """Linear attention as lucidrains' networks have it, with and without a memory."""
    q, k, v = (part.reshape(2, 4, 6, 48) for part in net.qkv(F.normalize(x, dim=1)).chunk(3, dim=1))
    if tokens:
        keys, values = (part.expand(2, -1, -1, -1) for part in net.memory[..., :tokens])
        k, v = torch.cat([keys, k], dim=-1), torch.cat([values, v], dim=-1)
    q, k = q.softmax(dim=-2), k.softmax(dim=-1)
    if by_einsum:
        context = torch.einsum("b h d n, b h e n -> b h d e", k, v)
        h = torch.einsum("b h d e, b h d n -> b h e n", context, q * 0.4)
    else:
        h = (v / 3 @ k.mT) @ (q * 0.4)
    return net.out(h.reshape(2, 24, 8, 6)) + x


def linear_attention(net: Network, x: Tensor, v: Tensor) -> Tensor:
    h = attend_linearly(net, attend_linearly(net, x, 4, True), 0, True)
    return attend_linearly(net, attend_linearly(net, h, 4, False), 0, False)


def memory_keys(net: Network, x: Tensor, v: Tensor) -> Tensor:
    """Attention with keys and values of a memory, written out."""
    q, k, v = (part.reshape(2, 4, 6, 48).mT for part in net.qkv(x).chunk(3, dim=1))
    keys, values = (part.mT.expand(2, -1, -1, -1) for part in net.memory)
    k, v = torch.cat([keys, k], dim=-2), torch.cat([values, v], dim=-2)
    weights = (torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.4).softmax(dim=-1)
    h = torch.einsum("b h i j, b h j d -> b h i d", weights, v)
    return net.out(h.mT.reshape(2, 24, 8, 6))


def squares(net: Network, x: Tensor, v: Tensor) -> Tensor:
    """Squares of pixels as one pixel each, by views and by a function."""
    a = x.reshape(2, 16, 4, 2, 3, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 64, 4, 3)
    b = x.reshape(2, 16, 4, 2, 3, 2).permute(0, 5, 1, 3, 2, 4).reshape(2, 64, 4, 3)
    turned = x.reshape(2, 16, 2, 4, 2, 3).permute(0, 1, 2, 4, 3, 5).reshape(2, 64, 4, 3)  # no squares
    return net.a(a) + net.a(b) + net.b(F.pixel_unshuffle(x, 2)) + net.a(turned)


NETWORKS = {
    "residual": Network(
        lambda n, x, v: n.b(F.silu(n.norm(n.a(x)))) + x,
        a=conv(16, 16),
        b=conv(16, 16),
        norm=nn.GroupNorm(4, 16),
    ),
    "in_place": Network(in_place, a=conv(16, 16), b=conv(16, 8)),
    "items": Network(items, a=conv(16, 16)),
    "modulated": Network(modulated, a=conv(16, 24), b=conv(16, 24, 1), norm=nn.GroupNorm(8, 16)),
    "shared_norm": Network(shared_norm, a=conv(16, 16), norm=nn.GroupNorm(8, 16)),
    "skips": Network(skips, a=conv(16, 12), b=conv(16, 20), c=conv(32, 8, 1), d=conv(80, 20)),
    "two_outputs": Network(two_outputs, a=conv(16, 16), b=conv(16, 16)),
    "downs_and_ups": Network(
        downs_and_ups,
        down=nn.Conv2d(16, 16, 3, stride=2),
        strided=conv(16, 24, stride=1),
        up=conv(24, 16),
        norm=nn.GroupNorm(4, 16),
    ),
    "not_known": Network(
        not_known,
        grouped=conv(16, 16, groups=4),
        dilated=nn.Conv2d(16, 16, 3, padding=2, dilation=2),
        a=conv(16, 16),
    ),
    "attention": Network(
        lambda n, x, v: attend(n, n.norm(x)) + x,
        q=nn.Linear(16, 16),
        k=nn.Linear(16, 16, bias=False),
        v=nn.Linear(16, 16),
        out=nn.Linear(16, 16),
        norm=nn.GroupNorm(4, 16),
    ),
    "cross_attention": Network(
        cross_attend,
        q=nn.Linear(16, 16),
        k=nn.Linear(4, 16, bias=False),
        v=nn.Linear(4, 16),
        out=nn.Linear(16, 16),
    ),
    "activated": Network(
        activated,
        a=conv(16, 16),
        first=nn.Linear(16, 16),
        gated=nn.Linear(16, 32, bias=False),
        vector=nn.Linear(32, 16),
    ),
    "linear_on_maps": Network(linear_on_maps, first=nn.Linear(16, 20), second=nn.Linear(32, 20)),
    "expanded": Network(lambda n, x, v: n.a(x) * x.mean((2, 3), keepdim=True).expand_as(x), a=conv(16, 16)),
    "channel_norms": Network(channel_norms, conv=conv(16, 16)),
    "linear_attention": Network(linear_attention, qkv=conv(16, 72, 1), out=conv(24, 16, 1)),
    "memory_keys": Network(memory_keys, qkv=conv(16, 72, 1), out=conv(24, 16, 1)),
    "squares": Network(squares, a=conv(64, 20, 1), b=conv(64, 20, 1, bias=False)),
    "other_norms": Network(other_norms, conv=conv(16, 16)),
    "times": Network(times, a=conv(16, 16), b=conv(16, 16)),
}
for name, width in (("first", 64), ("gated", 32)):
    NETWORKS.setdefault("sequences", Network(sequences)).add_module(name, nn.Linear(16, width))
NETWORKS["sequences"].add_module("second", nn.Linear(64, 16))
NETWORKS["sequences"].w, NETWORKS["sequences"].b = (nn.Parameter(torch.rand(16)) for _ in range(2))
for name in ("linear_attention", "memory_keys"):
    NETWORKS[name].memory = nn.Parameter(torch.randn(2, 4, 6, 4))
NETWORKS["channel_norms"].g, NETWORKS["channel_norms"].b = (nn.Parameter(torch.rand(16)) for _ in range(2))


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 16, 8, 6), "v": (2, 32)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def leaves(result: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(result)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_equals_the_network(name, simd):
    network, given = NETWORKS[name], arguments()
    with torch.no_grad():
        plan = plan_of(network, given)
        actual = outputs_of(plan, given)
        again = outputs_of(plan, given)  # the buffers hold other values now
        expected = leaves(network.double()(**arguments(torch.float64)))
        network.float()
    assert len(actual) == len(expected)
    for a, b, c in zip(actual, expected, again, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
        assert torch.equal(a, c)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_in_bfloat16_is_as_accurate_as_pytorch(name):
    network, given = NETWORKS[name], arguments()
    with torch.no_grad():
        actual = outputs_of(plan_of(network, given, torch.bfloat16), given)
        expected = leaves(network.double()(**arguments(torch.float64)))
        peer = leaves(network.bfloat16()(**arguments(torch.bfloat16)))
        network.float()
    for a, b, p in zip(actual, expected, peer, strict=True):
        error, allowed = (a - b).abs().max(), (p - b).abs().max()
        assert error <= 2 * allowed + 4 * torch.finfo(torch.bfloat16).eps * b.abs().max()


@pytest.mark.parametrize(
    ("name", "convolutions"),
    [
        ("residual", 2),
        ("modulated", 2),
        ("skips", 4),
        ("downs_and_ups", 3),
        ("attention", 2),
        ("cross_attention", 3),
        ("sequences", 3),
    ],
)
def test_neighbours_become_one_call(name, convolutions):
    """Norms, sums, doublings and paddings go into the convolutions; three linear maps become one."""
    plan = plan_of(NETWORKS[name], arguments())
    assert [call[0] for call in plan.layout.calls].count(convolution_) == convolutions
    unfused = [node.op for node in plan.layout.unfused]
    assert unfused == {"downs_and_ups": ["call", "add"]}.get(name, [])


def test_norms_over_channels_become_one_call():
    """Each with its weights, modulation, SiLU and the sum after it."""
    plan = plan_of(NETWORKS["channel_norms"], arguments())
    assert [call[0] for call in plan.layout.calls].count(layer_norm_) == 7
    assert len(plan.layout.unfused) == 1


def test_linear_attention_becomes_one_call():
    plan = plan_of(NETWORKS["linear_attention"], arguments())
    functions = [call[0] for call in plan.layout.calls]
    assert [functions.count(f) for f in (linear_attention_, convolution_, layer_norm_)] == [4, 8, 4]
    assert len(functions) == 16


def test_memory_keys_go_to_the_attention():
    plan = plan_of(NETWORKS["memory_keys"], arguments())
    assert [call[0] for call in plan.layout.calls].count(attention_) == 1
    assert not plan.layout.unfused


def test_squares_are_copied_pixel_by_pixel():
    plan = plan_of(NETWORKS["squares"], arguments())
    assert [node.op for node in plan.graph.nodes].count("squares") == 3
    assert not plan.layout.unfused


def test_memory_is_used_again():
    """A chain of convolutions needs the memory of two of their outputs, however long it is."""
    network = nn.Sequential(*(conv(16, 16) for _ in range(9)))
    given = {"input": torch.randn(2, 16, 8, 8)}
    plan = plan_of(network, given)
    one = given["input"].numel() * 4
    assert plan.layout.placement.pool.bytes <= 2 * one
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(plan, given)[0], network(given["input"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda n, x, v: n.a(x) + torch.randn(2, 16, 8, 6), "it draws random numbers, by randn"),
        (lambda n, x, v: n.a(x).fill_(0), "it writes in place, by fill_"),
        (
            lambda n, x, v: (h := n.a(x), h.view(-1).__setitem__(0, 0))[0],
            "changes a tensor that something else shares, by setitem",
        ),
        (lambda n, x, v: (h := n.a(x), h.view(-1).add_(1))[0], "changes a tensor that something else shares"),
        (lambda n, x, v: x.add_(1), "changes a tensor that something else shares, by add_"),
    ],
)
def test_what_cannot_be_traced(function, reason):
    with pytest.raises(Untraceable, match=reason):
        plan_of(Network(function, a=conv(16, 16)), arguments())


@pytest.mark.parametrize("name", ["attention", "activated", "not_known"])
def test_plans_share_weights(name):
    """Another batch packs nothing anew, not even weights that are joined or computed for each plan."""
    network = NETWORKS[name]
    weights = Weights(list(network.parameters()), torch.float32)
    counts = []
    for batch in (2, 3):
        given = {name: torch.randn(batch, *value.shape[1:]) for name, value in arguments().items()}
        plan_of(network, given, weights=weights)
        counts.append((len(weights._packed), len(weights._copies)))
    assert counts[0] == counts[1]
