"""Joins a group normalisation with its modulation and SiLU."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..graph import FLOATS, Graph, Node, Value, map_of, shares_memory
from ..view_functions import Chain, Reshape
from .following import Joined, join_following
from .inputs import NORM_INPUTS, other_operand


def fuse_norms(graph: Graph) -> None:
    join_following(graph, "norm", NORM_INPUTS, lambda node: _joined(node, graph))


def _joined(node: Node, graph: Graph) -> Joined | None:
    """A group normalisation of a map, with its modulation and SiLU; None for another node."""
    if node.op != "group_norm" or node.output.ndim != 4:
        return None
    if any(value is not None and value.constant is None for value in node.inputs[1:]):
        return None
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
            other = other_operand(user, output)
            factor = channel_constant(other, output, 1)
            if factor is not None:
                weight = _times(weight, factor)
                bias = None if bias is None else _times(bias, factor)
            else:
                scale = vector_of(other, output, plus_one=True)
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
    options = {"groups": node.options["groups"], "eps": node.options["eps"], "silu": silu}
    return Joined(nodes, (x, weight, bias, add, scale, shift), output, options)


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
            return None if plus_one else _constant_vector(value, like)
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


def channel_constant(value: Value | None, like: Value, channel: int) -> Tensor | None:
    """A constant of one number for each channel, or for all, as float32 [C]; None for another value.

    channel: the dimension of the channels of `like`, with which the value is broadcast.
    """
    constant = None if value is None else value.constant
    if constant is None or constant.dtype not in FLOATS or constant.ndim > like.ndim:
        return None
    c, place = like.shape[channel], channel - like.ndim  # from the right
    each = constant.ndim >= -place and constant.numel() == constant.shape[place] == c
    if not each and constant.numel() != 1:
        return None
    return constant.detach().float().flatten().expand(c).contiguous()


def _times(value: Value | None, factor: Tensor) -> Value:
    """A norm's constant weight or bias [C], by default ones, times `factor`."""
    known = None if value is None else value.constant
    product = factor if known is None else known.detach().float() * factor
    return Value(product, "of a norm", constant=product)


def _constant_vector(value: Value, like: Value) -> Value | None:
    """A constant [N or 1, C, 1, ...] as a constant [N, C]; None for another value."""
    constant, (n, c) = value.constant, like.shape[:2]
    if constant is None or constant.dtype not in FLOATS or constant.ndim != like.ndim:
        return None
    if constant.shape[0] not in (1, n) or constant.shape[1] != c or constant.numel() != constant.shape[0] * c:
        return None
    vector = constant.detach().float().flatten(1).expand(n, c)
    return Value(vector, "a constant vector", constant=vector)
