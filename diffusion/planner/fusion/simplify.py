"""Reduces a graph to few kinds of nodes.

A product with a constant matrix becomes a linear map; a constant that is added to the channels of a
convolution or linear map becomes its bias; convolutions of single channels by constant squares become
averages and doublings.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from ..calls import Slot, Template, function_node, name_of
from ..graph import FLOATS, Graph, Node, Value
from ..known_functions import uniform
from .inputs import other_operand


def simplify(graph: Graph) -> None:
    for node in graph.visit():
        for rewrite in (_linear_of_product, _with_bias, _resampling):
            new = rewrite(graph, node)
            if new is not None:
                _replace(graph, node, new)
                break


def _replace(graph: Graph, old: Node, new: Node) -> None:
    old.remove()
    graph.nodes[graph.nodes.index(old)] = new


def constant_value(tensor: Tensor, name: str) -> Value:
    return Value(tensor, name, constant=tensor)


def _linear_of_product(graph: Graph, node: Node) -> Node | None:
    """x @ W for a constant W [C, K] as a linear map with the weight [K, C]."""
    if node.op != "product" or len(node.inputs) != 2 or node.options["scale"] != 1:
        return None
    x, matrix = node.inputs
    assert x is not None
    assert matrix is not None
    of_x, of_matrix, of_out = node.options["equation"].replace("->", ",").split(",")
    if matrix.constant is None or x.constant is not None or len(of_matrix) != 2:
        return None
    contracted = of_x[-1]
    if contracted not in of_matrix or contracted in of_out:
        return None
    (kept,) = of_matrix.replace(contracted, "")
    if of_out != of_x[:-1] + kept:
        return None
    tensor = matrix.constant.detach()
    weight = constant_value(tensor.t() if of_matrix[0] == contracted else tensor, matrix.name)
    return function_node("linear", F.linear, [x, weight], node.output)


def _with_bias(graph: Graph, node: Node) -> Node | None:
    """A sum of a convolution's or linear map's output and a constant for each channel."""
    if node.op != "add" or node.options["scalar"] is not None:
        return None
    for value in node.reads():
        made, constant = value.node, other_operand(node, value)
        if made is None or made.op not in ("conv", "linear", "conv1d") or constant is None:
            continue
        if value.users != [node] or value in graph.outputs or value.shape != node.output.shape:
            continue
        if value.dtype != node.output.dtype:
            continue
        channel = value.ndim - 1 if made.op == "linear" else 1
        added = _of_channels(constant, value.shape[channel], value.ndim - 1 - channel)
        biases = made.inputs[2:]
        if added is None or any(bias is not None and bias.constant is None for bias in biases):
            continue
        for bias in biases:
            if bias is not None and bias.constant is not None:
                added = added + bias.constant.detach()
        graph.nodes.remove(made)
        made.remove()
        inputs = [next(made.reads()), made.inputs[1], constant_value(added, constant.name)]
        return _rewritten(made, [value for value in inputs if value is not None], node.output)
    return None


def _of_channels(value: Value, channels: int, after: int) -> Tensor | None:
    """A constant [..., C, 1, ...] with `after` dimensions after them, as [C]; or None."""
    constant = value.constant
    if constant is None or constant.dtype not in FLOATS or constant.numel() != channels:
        return None
    if constant.ndim <= after or constant.shape[constant.ndim - 1 - after] != channels:
        return None
    return constant.detach().flatten()


def _rewritten(made: Node, inputs: list[Value], output: Value) -> Node:
    """The convolution or linear map with other inputs and another output."""
    options = made.own_options()
    if made.op == "conv":
        arguments = (options["stride"], options["padding"])
        return function_node("conv", F.conv2d, inputs, output, arguments, **options)
    function: Callable = F.linear if made.op == "linear" else F.conv1d
    return function_node(made.op, function, inputs, output, **options)


def _resampling(graph: Graph, node: Node) -> Node | None:
    """A convolution of each channel by itself with squares of 1/4, and a transposed one with squares of 1."""
    name = name_of(node.options["call"].function) if node.op == "call" else ""
    if name not in _RESAMPLINGS:
        return None
    read, number, op = _RESAMPLINGS[name]
    x, *weights = node.inputs
    if x is None or x.ndim != 4 or len(weights) != 1 or weights[0] is None:
        return None
    filters = weights[0].constant
    template: Template = node.options["call"]
    args, options = pytree.tree_unflatten(template.leaves, template.structure)
    try:
        found = read(*args, **options)
    except TypeError:
        return None
    squares = filters is not None and tuple(filters.shape) == (x.shape[1], 1, 2, 2)
    if not squares or filters is None or found != (x.shape[1], 2, 0) or not bool((filters == number).all()):
        return None
    if op == "average":
        return function_node(op, F.avg_pool2d, [x], node.output, (2,))
    return function_node(op, _doubled, [x], node.output)


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def _plain(bias: Any, *ones: Any) -> bool:
    return bias is None and all(one in (1, (1, 1), [1, 1]) for one in ones)


def _conv_arguments(
    input: Slot,
    weight: Slot,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple | None:
    """(groups, stride, padding), or None with a bias or a dilation."""
    return (groups, uniform(stride), uniform(padding)) if _plain(bias, dilation) else None


def _transposed_arguments(
    input: Slot,
    weight: Slot,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple | None:
    plain = _plain(bias, dilation) and output_padding in (0, (0, 0), [0, 0])
    return (groups, uniform(stride), uniform(padding)) if plain else None


_RESAMPLINGS: dict[str, tuple[Callable[..., tuple | None], float, str]] = {
    "conv2d": (_conv_arguments, 0.25, "average"),
    "conv_transpose2d": (_transposed_arguments, 1.0, "double"),
}
