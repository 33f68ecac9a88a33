"""Recognises linear attention, which a network writes by two softmaxes and two products (Shen et al. 2018).

A summary of the keys, softmax(k, over positions) v, is multiplied by softmax(q, over channels).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..graph import FLOATS, Graph, Node, Value, shares_memory
from ..view_functions import Heads, MergedHeads
from .attention import unscaled
from .simplify import constant_value


class _Parts(NamedTuple):
    """The factors of both products, with the letters of their dimensions."""

    factors: tuple[Value, Value, Value]  # q and k before their softmaxes, and v
    letters: tuple[str, str, str]
    insides: tuple[str, str, str]  # of channels and positions
    batch: str
    out: str
    scale: float


def fuse_linear_attention(graph: Graph) -> None:
    """Makes one node of each linear attention, with keys and values of a memory that are constants."""
    replaced: dict[Node, list[Node]] = {}
    for node in graph.visit():
        if node.op != "product" or len(node.inputs) != 2 or graph.stays_wide(node.output):
            continue
        parts = _parts(node, 0) or _parts(node, 1)
        if parts is not None:
            replaced[node] = _fused(node, parts)
    graph.nodes = [new for node in graph.nodes for new in replaced.get(node, [node])]
    graph.drop_unused()


def _read(node: Node, position: int, letters: str) -> tuple[Value, str, float]:
    """A factor of a product without the numbers that it is multiplied by and in the order of its memory.

    letters: of its dimensions. Returns the value, the letters of its dimensions and the numbers' product.
    """
    value = node.inputs[position]
    assert value is not None
    scale = 1.0
    while True:
        value, factor = unscaled(value)
        scale *= factor
        order = _permutation(value.node)
        if order is None or value.node is None:
            return value, letters, scale
        value = next(value.node.reads())
        letters = "".join(letters[order.index(dimension)] for dimension in range(len(order)))


def _permutation(node: Node | None) -> list[int] | None:
    """The order in which a view puts the dimensions of its source, or None for another node."""
    if node is None or node.op != "view":
        return None
    source = next(node.reads())
    like = torch.empty(source.shape, device="meta")
    seen = node.options["apply"](like)
    if seen.ndim != like.ndim or not shares_memory(seen, like) or min(like.shape, default=0) < 2:
        return None
    order = [like.stride().index(step) if step in like.stride() else -1 for step in seen.stride()]
    fits = sorted(order) == list(range(like.ndim)) and seen.shape == like.permute(order).shape
    return order if fits else None


def _softmax(value: Value, letters: str) -> tuple[Value, str] | None:
    """The operand of a softmax, and the letter of its dimension; None for another value."""
    node = value.node
    if node is None or node.op != "softmax":
        return None
    return next(node.reads()), letters[node.options["dim"]]


def _parts(last: Node, position: int) -> _Parts | None:
    """The parts of a linear attention that ends at a product, whose factor `position` is the summary."""
    two = last.options["equation"].replace("->", ",").split(",")
    summary, of_summary, scale = _read(last, position, two[position])
    q, of_q, factor = _read(last, 1 - position, two[1 - position])
    first = summary.node
    if first is None or first.op != "product" or len(first.inputs) != 2:
        return None
    scale *= factor * first.options["scale"] * last.options["scale"]
    one = first.options["equation"].replace("->", ",").split(",")
    names = dict(zip(of_summary, one[2], strict=True))
    unused = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for letter in of_q + two[2]:
        if letter not in names:
            names[letter] = next(unused)
    of_q, out = ("".join(names[letter] for letter in letters) for letters in (of_q, two[2]))
    queries = _softmax(q, of_q)
    for j in (0, 1):
        k, of_k, k_factor = _read(first, j, one[j])
        v, of_v, v_factor = _read(first, 1 - j, one[1 - j])
        keys = _softmax(k, of_k)
        if queries is None or keys is None:
            continue
        batch = "".join(letter for letter in of_k if letter in of_v and letter in one[2])
        d, s = queries[1], keys[1]
        of_channels, of_positions = set(of_v) - {*batch, s}, set(of_q) - {*batch, d}
        if len(of_channels) != 1 or len(of_positions) != 1 or len(batch) not in (1, 2):
            continue
        (e,), (m,) = of_channels, of_positions
        expected = (batch + d + m, batch + d + s, batch + e + s, batch + d + e, batch + e + m)
        found = (of_q, of_k, of_v, one[2], out)
        if any(sorted(a) != sorted(b) for a, b in zip(found, expected, strict=True)):
            continue
        factors = (queries[0], keys[0], v)
        if any(value.dtype not in FLOATS or value.constant is not None for value in factors):
            continue
        insides, letters = (d + m, d + s, e + s), (of_q, of_k, of_v)
        if last.output.dtype in FLOATS and _one_size(factors, letters, batch):
            return _Parts(factors, letters, insides, batch, out, scale * k_factor * v_factor)
    return None


def _one_size(factors: tuple[Value, ...], letters: tuple[str, ...], batch: str) -> bool:
    """Whether images and heads are as many in all factors, not broadcast."""
    sizes = {
        tuple(value.shape[of.index(x)] for x in batch) for value, of in zip(factors, letters, strict=True)
    }
    return len(sizes) == 1


def _fused(last: Node, parts: _Parts) -> list[Node]:
    values = list(parts.factors)
    # One dimension for images and heads becomes that of images.
    images = values[0].shape[parts.letters[0].index(parts.batch)] if len(parts.batch) == 1 else None
    orders = [
        Heads(tuple(of.index(letter) for letter in parts.batch + inside), images)
        for of, inside in zip(parts.letters, parts.insides, strict=True)
    ]
    memory = _memory(values[1], values[2], orders[1], orders[2])
    if memory is not None:
        values[1:] = memory[:2]
    nodes: list[Node] = []
    inputs: list[Value] = []
    for value, order in zip(values, orders, strict=True):
        view = Value(order(torch.empty(value.shape, dtype=value.dtype, device="meta")))
        nodes.append(Node("view", [value], [view], apply=order))
        inputs.append(view)
    shape = (*inputs[0].shape[:2], inputs[2].shape[2], inputs[0].shape[3])
    out = Value(torch.empty(shape, dtype=last.output.dtype, device="meta"))
    inside = parts.batch + parts.insides[2][0] + parts.insides[0][1]
    merged = MergedHeads(tuple(inside.index(letter) for letter in parts.out), images)
    last.remove()
    nodes.append(Node("linear_attention", [*inputs, *(memory or ())[2:]], [out], scale=parts.scale))
    nodes.append(Node("view", [out], [last.output], apply=merged))
    return nodes


class _Joined(NamedTuple):
    """A concatenation of a value and of a constant, which is the first of both or not."""

    value: Value
    constant: Tensor
    first: bool


def _joined(value: Value, dimension: int) -> _Joined | None:
    node = value.node
    if node is None or node.op != "join" or len(node.inputs) != 2 or node.options["dim"] != dimension:
        return None
    for i, (one, other) in enumerate((node.inputs, node.inputs[::-1])):
        if one is not None and other is not None and one.constant is not None and other.constant is None:
            return _Joined(other, one.constant.detach(), i == 0)
    return None


def _memory(k: Value, v: Value, of_k: Heads, of_v: Heads) -> tuple[Value, Value, Value, Value] | None:
    """Keys and values without those of a memory, and those, [heads, channels, tokens]; or None.

    The memory is the same for all images.
    """
    keys, values = _joined(k, of_k.order[-1]), _joined(v, of_v.order[-1])
    if keys is None or values is None or keys.first != values.first or of_k.images is not None:
        return None
    constants = [order(part.constant) for part, order in ((keys, of_k), (values, of_v))]
    if constants[0].shape[-1] != constants[1].shape[-1]:
        return None
    if any(not torch.equal(constant, constant[:1].expand_as(constant)) for constant in constants):
        return None
    memory = [constant_value(constant[0], "the keys or values of a memory") for constant in constants]
    return keys.value, values.value, memory[0], memory[1]
