"""Joins a group normalisation with its modulation and SiLU."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..graph import FLOATS, Graph, Node, Value, map_of, shares_memory
from ..view_functions import Chain, Reshape
from .inputs import NORM_INPUTS, other_operand


class _Norm(NamedTuple):
    """A group normalisation with all that follows it up to `output`."""

    nodes: list[Node]
    inputs: tuple[Value | None, ...]  # NORM_INPUTS
    silu: bool
    output: Value


def fuse_norms(graph: Graph) -> None:
    replaced: dict[Node, list[Node]] = {}
    known = set(graph.nodes)
    for node in graph.visit():
        affine = [value for value in node.inputs[1:] if value is not None]
        if node.op != "group_norm" or node.output.ndim != 4 or any(v.constant is None for v in affine):
            continue
        norm = _parsed(node, graph)
        if graph.stays_wide(norm.output):
            continue
        options = {"groups": node.options["groups"], "eps": node.options["eps"], "silu": norm.silu}
        replaced |= {old: [] for old in norm.nodes}
        for old in norm.nodes:
            old.remove()
        fused = Node("norm", norm.inputs, [norm.output], names=NORM_INPUTS, **options)
        views = [value.node for value in fused.reads() if value.node is not None and value.node.op == "view"]
        replaced[norm.nodes[-1]] = [*(view for view in views if view not in known), fused]
        known.update(views)
    graph.nodes = [new for node in graph.nodes for new in replaced.get(node, [node])]


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
            scale = vector_of(other_operand(user, output), output, plus_one=True)
            if scale is None:
                break
        elif user.op == "add" and shift is None:
            shift = vector_of(other_operand(user, output), output)
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
                vector = vector_of(other, map_)
                if vector is not None:
                    return map_, vector
    return None


def vector_of(value: Value | None, like: Value, plus_one: bool = False) -> Value | None:
    """The value [N, C] of which this one is a view [N, C, 1, 1], for a map `like`; None if it is no such.

    plus_one: of which this one is a view with 1 added. The value may be a new view, with a node in no graph.
    """
    n, c = like.shape[:2]
    chain: list[Callable[[Tensor], Tensor]] = []
    while value is not None and (value.shape != (n, c) or plus_one):
        node = value.node
        if node is None and value.constant is not None:
            return _constant_vector(value, like, plus_one)
        if node is not None and node.op == "add" and node.options["scalar"] == 1 and plus_one:
            plus_one = False
        elif node is not None and node.op == "view":
            chain.insert(0, node.options["apply"])
        elif plus_one or value.ndim != 2:
            return None
        else:
            break
        value = node.inputs[0]
    if value is None or value.dtype not in FLOATS:
        return None
    source = torch.empty(value.shape, device="meta")
    tensor = source
    for apply in chain:
        tensor = apply(tensor)
    wide = tensor.shape == (n, c) + (1,) * (like.ndim - 2) and shares_memory(tensor, source)
    if (
        not wide
        or (c > 1 and tensor.stride()[1] != 1)
        or (n > 1 and tensor.stride()[0] != source.stride()[0])
    ):
        return None
    if value.shape == (n, c):
        return value
    view = Value(torch.empty((n, c), dtype=value.dtype, device="meta"))
    return Node("view", [value], [view], apply=Chain((*chain, Reshape(view.shape)))).output


def _constant_vector(value: Value, like: Value, plus_one: bool) -> Value | None:
    """A constant [N or 1, C, 1, ...] as a constant [N, C], less 1 for `plus_one`; None for another value."""
    constant, (n, c) = value.constant, like.shape[:2]
    if constant is None or constant.dtype not in FLOATS or constant.ndim != like.ndim:
        return None
    if constant.shape[0] not in (1, n) or constant.shape[1] != c or constant.numel() != constant.shape[0] * c:
        return None
    vector = constant.detach().float().flatten(1).expand(n, c) - (1 if plus_one else 0)
    return Value(vector, "a constant vector", constant=vector)
