"""Computes sequences [N, C, S] that are views of maps [N, C, H, W] as maps: convolutions, norms and sums."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..calls import function_node
from ..graph import Graph, Node, Value, apply_views, viewed
from ..view_functions import Reshape
from .simplify import constant_value

_ELEMENTWISE = ("add", "sub", "mul", "div", "silu", "gelu")
_WIDENED = (*_ELEMENTWISE, "group_norm", "conv1d")


def widen_sequences(graph: Graph, ops: Sequence[str] = _WIDENED) -> None:
    """Lets nodes on views [N, C, H W] of maps compute on the maps, and makes conv1d a convolution of maps.

    ops: of the nodes.
    """
    nodes: list[Node] = []
    for node in graph.visit():
        nodes += (_widened(node, graph) if node.op in ops else None) or [node]
    graph.nodes = nodes


def _widened(node: Node, graph: Graph) -> list[Node] | None:
    sequence = len(node.outputs) == 1 and node.output.ndim == 3 and node.output not in graph.outputs
    if not sequence:
        return None
    values = [value for value in node.reads() if node.op in _ELEMENTWISE or value is node.inputs[0]]
    if any(
        value.shape[0] != node.output.shape[0] or value.shape[2:] != node.output.shape[2:] for value in values
    ):
        return None
    if node.op in _ELEMENTWISE and any(value.shape != node.output.shape for value in values):
        return None
    sources = [source for value in values if (source := _map_under(value)) is not None]
    if not sources and node.op != "conv1d":
        return None
    size = sources[0].shape[2:] if sources else (node.output.shape[2], 1)
    if node.op == "conv1d" and any(value.constant is None for value in list(node.reads())[1:]):
        return None
    new: list[Node] = []
    inputs: list[Value | None] = []
    for value in node.inputs:
        source = _map_under(value) if value is not None and value in values else None
        if value is None or value not in values:
            inputs.append(value)
        elif source is not None and source.shape[2:] == size:
            inputs.append(source)
        else:
            shape = torch.Size((*value.shape[:2], *size))
            wide = Value(torch.empty(shape, dtype=value.dtype, device="meta"))
            new.append(Node("view", [value], [wide], apply=Reshape(shape)))
            inputs.append(wide)
    shape = torch.Size((*node.output.shape[:2], *size))
    whole = Value(torch.empty(shape, dtype=node.output.dtype, device="meta"))
    node.remove()
    if node.op == "conv1d":
        x, weight, *bias = inputs
        assert x is not None
        assert weight is not None
        assert weight.constant is not None
        square = constant_value(weight.constant.detach()[..., None], weight.name)
        given = [value for value in (x, square, *bias) if value is not None]
        new.append(function_node("conv", F.conv2d, given, whole, stride=1, padding=0))
    else:
        new.append(Node(node.op, inputs, [whole], **node.options))
    return [*new, Node("view", [whole], [node.output], apply=Reshape(node.output.shape))]


def _map_under(value: Value) -> Value | None:
    """The map [N, C, H, W] of which this is the view [N, C, H W], in the order of its pixels."""
    source = viewed(value)
    if source.ndim != 4 or source.shape[:2] != value.shape[:2] or source.shape.numel() != value.shape.numel():
        return None
    if source.node is not None and source.node.op in ("attention", "linear_attention"):
        return None
    seen = apply_views(value, source, torch.empty(source.shape, device="meta"))
    return source if seen is not None and seen.is_contiguous() else None
