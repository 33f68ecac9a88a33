"""Joins linear maps of the same input, such as queries, keys and values, into one."""

import torch

from ..graph import Graph, Node, Value
from ..view_functions import Range
from .inputs import CONVOLUTION_INPUTS, named


def join_siblings(graph: Graph) -> None:
    """Makes one convolution of several linear maps of the same pixels, such as queries, keys and values."""
    groups: dict[tuple, list[Node]] = {}
    for node in graph.visit():
        if node.op != "convolution" or node.options["kernel"] != 1 or node.output in graph.outputs:
            continue
        inputs = named(node)
        plain = inputs["residual"] is None and node.options["activation"] == "none"
        if plain and tuple(node.options[name] for name in ("stride", "scale", "factor")) == (1, 1, 1):
            shape = list(node.output.shape)
            del shape[_channel_of(node)]
            layout = (*shape, node.options["reads_rows"], node.options["writes_rows"])
            groups.setdefault((inputs["x"], inputs["affine"], *layout), []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            graph.visited = nodes[0]
            _join(graph, nodes)


def _channel_of(node: Node) -> int:
    """The dimension of the output that holds the channels."""
    return node.output.ndim - 1 if node.options["writes_rows"] else 1


def _join(graph: Graph, nodes: list[Node]) -> None:
    first = nodes[0]
    weights, biases = ([named(node)[name] for node in nodes] for name in ("weight", "bias"))
    tensors = [value.constant for value in weights if value is not None and value.constant is not None]
    sizes = [tensor.shape[0] for tensor in tensors]
    weight = torch.cat([tensor.detach().flatten(1) for tensor in tensors])
    bias = None
    if any(value is not None for value in biases):
        parts = [
            tensor.new_zeros(size) if value is None or value.constant is None else value.constant.detach()
            for value, size, tensor in zip(biases, sizes, tensors, strict=True)
        ]
        bias = Value(torch.cat(parts), "joined biases", constant=torch.cat(parts))
    channel = _channel_of(first)
    shape = list(first.output.shape)
    shape[channel] = sum(sizes)
    joined = Value(torch.empty(shape, dtype=first.output.dtype, device="meta"))
    inputs = named(first)
    values = (inputs["x"], Value(weight, "joined weights", constant=weight), bias, inputs["affine"], None)
    position = graph.nodes.index(first)
    options = {key: value for key, value in first.options.items() if key != "names"}
    for node in nodes:
        node.remove()
        graph.nodes.remove(node)
    new = [Node("convolution", values, [joined], names=CONVOLUTION_INPUTS, **options)]
    start = 0
    for node, size in zip(nodes, sizes, strict=True):
        new.append(Node("view", [joined], [node.output], apply=Range(channel, start, size)))
        start += size
    graph.nodes[position:position] = new
