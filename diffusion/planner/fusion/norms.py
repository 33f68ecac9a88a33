"""Joins a group normalisation with its modulation and SiLU."""

from typing import NamedTuple

import torch

from ..graph import Graph, Node, Value, apply_views, map_of, viewed
from ..lowering import FLOATS, Reshape
from .inputs import NORM_INPUTS, other_operand


def normalise_maps(graph: Graph) -> None:
    """Lets a group normalisation of a view [N, C, H W] read the map [N, C, H, W] itself."""
    for node in list(graph.nodes):
        if node.op != "group_norm" or node.output.ndim != 3 or node.output in graph.outputs:
            continue
        x = node.inputs[0]
        assert x is not None
        source = viewed(x)
        if source.ndim != 4 or source.shape[:2] != x.shape[:2] or source.shape.numel() != x.shape.numel():
            continue
        like = torch.empty(source.shape, device="meta")  # the view keeps the order of pixels if this one does
        seen = apply_views(x, source, like)
        if seen is None or not seen.is_contiguous():
            continue
        whole = Value(torch.empty(source.shape, dtype=node.output.dtype, device="meta"))
        options = {name: node.options[name] for name in ("call", "groups", "eps")}
        view = Node("view", [whole], [node.output], apply=Reshape(node.output.shape))
        node.remove()
        new = Node("group_norm", [source, *node.inputs[1:]], [whole], **options)
        position = graph.nodes.index(node)
        graph.nodes[position : position + 1] = [new, view]


class _Norm(NamedTuple):
    """A group normalisation with all that follows it up to `output`."""

    nodes: list[Node]
    inputs: tuple[Value | None, ...]  # NORM_INPUTS
    silu: bool
    output: Value


def fuse_norms(graph: Graph) -> None:
    replaced: dict[Node, Node | None] = {}
    for node in graph.nodes:
        if node.op != "group_norm" or node.output.ndim != 4:
            continue
        norm = _parsed(node, graph)
        options = {"groups": node.options["groups"], "eps": node.options["eps"], "silu": norm.silu}
        replaced |= dict.fromkeys(norm.nodes)
        for old in norm.nodes:
            old.remove()
        replaced[norm.nodes[-1]] = Node("norm", norm.inputs, [norm.output], names=NORM_INPUTS, **options)
    graph.nodes = [new for node in graph.nodes if (new := replaced.get(node, node)) is not None]


def _parsed(node: Node, graph: Graph) -> _Norm:
    x, *affine = node.inputs
    weight, bias = (*affine, None, None)[:2]
    assert x is not None
    nodes, output = [node], node.output
    add = scale = shift = None
    silu = False
    before = x.node
    if before is not None and before.op == "add" and x.users == [node] and x not in graph.outputs:
        split = _map_and_vector(before)
        if split is not None:
            x, add = split
            nodes.insert(0, before)
    while len(output.users) == 1 and output not in graph.outputs and not silu:
        (user,) = output.users
        if user.op == "view" and user.output.shape == output.shape and map_of(user.output) is map_of(output):
            pass
        elif user.op == "mul" and scale is None and shift is None:
            scale = _vector(other_operand(user, output), output, plus_one=True)
            if scale is None:
                break
        elif user.op == "add" and shift is None:
            shift = _vector(other_operand(user, output), output)
            if shift is None:
                break
        elif user.op == "silu":
            silu = True
        else:
            break
        nodes.append(user)
        output = user.output
    return _Norm(nodes, (x, weight, bias, add, scale, shift), silu, output)


def _map_and_vector(node: Node) -> tuple[Value, Value] | None:
    """The operands of a sum of a map and of one number for each image and channel, if it is that."""
    if len(node.inputs) == 2:
        for map_, other in (node.inputs, node.inputs[::-1]):
            assert map_ is not None
            if map_.shape == node.output.shape:
                vector = _vector(other, map_)
                if vector is not None:
                    return map_, vector
    return None


def _vector(value: Value | None, like: Value, plus_one: bool = False) -> Value | None:
    """The value [N, C] of which this one is a view [N, C, 1, 1], for a map `like`; None if it is no such.

    plus_one: of which this one is a view with 1 added.
    """
    n, c = like.shape[:2]
    chain = []
    while value is not None and (value.shape != (n, c) or plus_one):
        node = value.node
        if node is None:
            return _constant_vector(value, n, c, plus_one)
        if node.op == "add" and node.options["scalar"] == 1 and plus_one:
            plus_one = False
        elif node.op == "view":
            chain.append(node.options["apply"])
        else:
            return None
        value = node.inputs[0]
    if value is None or value.dtype not in FLOATS:
        return None
    tensor = torch.empty_strided((n, c), (c, 1), device="meta")
    for apply in reversed(chain):
        tensor = apply(tensor)
    wide = tensor.shape == (n, c) + (1,) * (like.ndim - 2)
    ordered = (c == 1 or tensor.stride()[1] == 1) and (n == 1 or tensor.stride()[0] == c)
    return value if wide and ordered else None


def _constant_vector(value: Value, n: int, c: int, plus_one: bool) -> Value | None:
    """A constant [N or 1, C, 1, ...] as a constant [N, C], less 1 for `plus_one`; None for another value."""
    constant = value.constant
    if constant is None or constant.dtype not in FLOATS or constant.ndim < 3:
        return None
    if constant.shape[0] not in (1, n) or constant.shape[1] != c or constant.numel() != constant.shape[0] * c:
        return None
    vector = constant.detach().float().flatten(1).expand(n, c) - (1 if plus_one else 0)
    return Value(vector, "a constant vector", constant=vector)
