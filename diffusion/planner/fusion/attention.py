"""Recognises attention that a network writes by itself: softmax(scale * q k^T) v, by any two products."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..calls import Slot, Template
from ..graph import FLOATS, Graph, Node, Value
from ..view_functions import Chain, Heads, MergedHeads, Range
from .inputs import factor_of
from .simplify import constant_value

View = Callable[[Tensor], Tensor]


class _Letters(NamedTuple):
    """The letters of both products' dimensions: one for each dimension of a tensor, in its order.

    batch: those of images and heads. keys_first: whether the keys come before the queries in the product.
    """

    batch: str
    query: str
    key: str
    inner: str  # of the channels that queries and keys share
    channel: str  # of the values' channels
    q: str
    k: str
    v: str
    out: str
    keys_first: bool


def fuse_attention(graph: Graph) -> None:
    """Makes attention nodes of softmaxes between two products."""
    replaced: dict[Node, list[Node]] = {}
    for node in graph.visit():
        if node.op == "softmax":
            replaced |= _attention(node, graph)
    if not replaced:
        return
    graph.nodes = [new for node in graph.nodes for new in replaced.get(node, [node])]
    graph.drop_unused()
    for node in graph.visit():
        if node.op == "attention":
            _order_heads(node, graph)


def _attention(softmax: Node, graph: Graph) -> dict[Node, list[Node]]:
    """The last product of an attention, with the nodes in its place; nothing for another softmax."""
    weights = softmax.output
    logits, scale = unscaled(next(softmax.reads()))
    if logits.node is None or logits.node.op != "product" or len(weights.users) != 1:
        return {}
    first, last = logits.node, weights.users[0]
    if last.op != "product" or not {weights, last.output}.isdisjoint(graph.outputs):
        return {}
    if graph.stays_wide(last.output):
        return {}
    position = last.inputs[-2:].index(weights)
    letters = _letters(first, last, softmax.options["dim"], position)
    factors = [*first.inputs[-2:], last.inputs[-1 - position]]
    if letters is None or any(value is None or value.dtype not in FLOATS for value in factors):
        return {}
    if letters.keys_first:
        factors[:2] = factors[1], factors[0]
    insides = (letters.query + letters.inner, letters.key + letters.inner, letters.key + letters.channel)
    images: int | None = None  # of a batch that has heads, too: where the queries come from tells how many
    nodes: list[Node] = []
    scales: list[float] = []
    for value, of, inside in zip(factors, (letters.q, letters.k, letters.v), insides, strict=True):
        assert value is not None
        source, applies, factor = _origin(value)
        if len(letters.batch) == 1 and images is None:
            count, together = next(iter(source.shape), 1), value.shape[of.index(letters.batch)]
            images = together if count == 0 or together % count else count
        heads = Heads(tuple(of.index(letter) for letter in letters.batch + inside), images)
        view = Value(heads(torch.empty(value.shape, dtype=value.dtype, device="meta")))
        nodes.append(Node("view", [source], [view], apply=Chain((*applies, heads))))
        scales.append(factor)
    q, k, v = (node.output for node in nodes)
    alike = q.shape[:2] == k.shape[:2] and k.shape == v.shape
    if not alike or q.shape[-1] != v.shape[-1] or scales[2] * last.options["scale"] != 1:
        for node in nodes:
            node.remove()
        return {}
    scale *= scales[0] * scales[1] * first.options["scale"]
    out = Value(torch.empty(q.shape, dtype=last.output.dtype, device="meta"))
    _, structure = pytree.tree_flatten(((None, None, None), {"scale": None}))
    leaves = [*map(Slot, range(3)), scale]
    template = Template(F.scaled_dot_product_attention, leaves, structure, [out.dtype] * 3)
    inside = letters.batch + letters.query + letters.channel
    merged = MergedHeads(tuple(inside.index(letter) for letter in letters.out), images)
    last.remove()
    nodes.append(Node("attention", [q, k, v], [out], call=template, scale=scale))
    nodes.append(Node("view", [out], [last.output], apply=merged))
    return {last: nodes}


def _letters(first: Node, last: Node, dim: int, position: int) -> _Letters | None:
    """The letters of two products, between which a softmax over the first one's dimension `dim` lies.

    position: of the softmax among the factors of the second product. Its letters are renamed to the first's.
    """
    a, b, logits = first.options["equation"].replace("->", ",").split(",")
    second = last.options["equation"].replace("->", ",").split(",")
    names = dict(zip(second[position], logits, strict=True))
    unused = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for letter in second[1 - position] + second[2]:
        if letter not in names:
            names[letter] = next(unused)
    v, out = ("".join(names[letter] for letter in second[i]) for i in (1 - position, 2))
    key = logits[dim]
    batch = "".join(letter for letter in logits if letter in a and letter in b)
    queries = "".join(letter for letter in logits if letter not in batch + key)
    inner = "".join(letter for letter in a if letter in b and letter not in logits)
    channels = "".join(letter for letter in v if letter not in batch + key)
    one_each = len(queries) == len(inner) == len(channels) == 1 and len(batch) in (1, 2)
    q, k = (a, b) if key in b else (b, a)
    expected = (
        batch + queries + inner,
        batch + key + inner,
        batch + key + channels,
        batch + queries + channels,
    )
    same = all(set(found) == set(wanted) for found, wanted in zip((q, k, v, out), expected, strict=True))
    if key in batch or not one_each or not same:
        return None
    return _Letters(batch, queries, key, inner, channels, q, k, v, out, keys_first=key in a)


def unscaled(value: Value) -> tuple[Value, float]:
    """A value without the numbers that it is multiplied by, and their product."""
    scale = 1.0
    while (factor := factor_of(value.node)) is not None:
        assert value.node is not None
        scale *= factor
        value = next(value.node.reads())
    return value, scale


def _origin(value: Value) -> tuple[Value, list[View], float]:
    """The value of which this one is a multiple of a view, the views, and the number."""
    views: list[View] = []
    scale = 1.0
    while value.node is not None:
        factor = factor_of(value.node)
        if factor is not None:
            scale *= factor
        elif value.node.op == "view":
            views.insert(0, value.node.options["apply"])
        else:
            break
        value = next(value.node.reads())
    return value, views, scale


# ---- Queries, keys and values of one convolution, whose numbers of a head do not lie side by side.


@dataclass(frozen=True)
class _Split:
    """Rows [N, S, heads D], or the map [N, heads D, H, W], as [N, heads, S, D]."""

    heads: int

    def __call__(self, tensor: Tensor) -> Tensor:
        rows = tensor.flatten(2).transpose(1, 2) if tensor.ndim == 4 else tensor
        return rows.unflatten(2, (self.heads, -1)).transpose(1, 2)


def _order_heads(attention: Node, graph: Graph) -> None:
    """Reorders a convolution's outputs, so that the numbers of a head lie side by side."""
    views = [value.node for value in attention.reads()]
    sources = {next(view.reads()) for view in views if view is not None and view.op == "view"}
    if len(sources) != 1 or any(view is None or view.op != "view" for view in views):
        return
    (source,) = sources
    made = source.node
    if made is None or made.op not in ("conv", "linear") or source.ndim not in (3, 4):
        return
    constants = [value.constant for value in made.inputs[1:] if value is not None]
    alone = set(source.users) == set(views) and source not in graph.outputs
    if any(constant is None for constant in constants) or not alone:
        return
    channel = 1 if made.op == "conv" else source.ndim - 1
    if (channel, source.ndim) not in ((1, 4), (2, 3)):
        return
    found = [_channels(view.options["apply"], source.shape, channel) for view in views if view is not None]
    orders = [order for order in found if order is not None]
    if len(orders) < 3 or all(_side_by_side(order) for order in orders):
        return
    order = torch.cat([part.flatten() for part in orders])
    if not torch.equal(order.sort().values, torch.arange(source.shape[channel], device="cpu")):
        return
    for value in list(made.inputs[1:]):
        if value is not None and value.constant is not None:
            made.replace_input(value, constant_value(value.constant.detach()[order], value.name))
    start = 0
    for view, part in zip(views, orders, strict=True):
        assert view is not None
        view.options["apply"] = Chain((Range(channel, start, part.numel()), _Split(part.shape[0])))
        start += part.numel()


def _channels(apply: View, shape: torch.Size, channel: int) -> Tensor | None:
    """The channels [heads, D] that a view [N, heads, S, D] reads; None if it does not read pixel by pixel."""
    sizes = [1] * len(shape)
    sizes[channel] = shape[channel]
    channels = torch.arange(shape[channel], device="cpu").view(sizes).expand(shape)
    seen = apply(channels)
    pixels = [1 if d == channel else n for d, n in enumerate(shape)]
    count = shape.numel() // shape[channel]
    positions = apply(torch.arange(count, device="cpu").view(pixels).expand(shape))
    expected = torch.arange(count, device="cpu").view(seen.shape[0], 1, -1, 1)
    if positions.shape[2] != expected.shape[2] or not torch.equal(positions, expected.expand_as(positions)):
        return None
    first = seen[:1, :, :1]
    return first[0, :, 0] if torch.equal(seen, first.expand_as(seen)) else None


def _side_by_side(order: Tensor) -> bool:
    """Whether the channels [heads, D] of a head follow each other."""
    return bool((order.diff(dim=1) == 1).all())
