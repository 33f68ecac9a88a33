"""Lets a convolution by a kernel of one read squares of pixels as they lie in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calls import function_node, name_of
from ..graph import Graph, Node, Value, viewed
from .simplify import constant_value


def order_squares(graph: Graph) -> None:
    """Reorders the channels of squares of pixels that a convolution by a kernel of one reads.

    Networks halve a map by making squares of pixels with C channels into pixels with 4 C, by views or by
    `pixel_unshuffle`. In the order of memory, pixel by pixel, this copies rows of numbers, not single ones.
    """
    replaced: dict[Node, list[Node]] = {}
    for node in graph.visit():
        if node.op != "conv" or (node.options["stride"], node.options["padding"]) != (1, 0):
            continue
        x, weight, *bias = node.inputs
        if x is None or weight is None or weight.constant is None or weight.shape[2:] != (1, 1):
            continue
        source = _source(x)
        order = None if source is None else _order(x, source)
        if source is None or order is None:
            continue
        squares = Value(torch.empty(x.shape, dtype=x.dtype, device="meta"))
        ordered = constant_value(weight.constant.detach()[:, order], weight.name)
        inputs = [squares, ordered, *(value for value in bias if value is not None)]
        node.remove()
        replaced[node] = [
            Node("squares", [source], [squares], side=source.shape[2] // x.shape[2]),
            function_node("conv", F.conv2d, inputs, node.output, **node.own_options()),
        ]
    graph.nodes = [new for node in graph.nodes for new in replaced.get(node, [node])]
    graph.drop_unused()


def _is_unshuffle(node: Node | None) -> bool:
    return (
        node is not None and node.op == "call" and name_of(node.options["call"].function) == "pixel_unshuffle"
    )


def _source(value: Value) -> Value | None:
    """The map whose squares of pixels could be the pixels of this one."""
    source = (
        next(value.node.reads()) if _is_unshuffle(value.node) and value.node is not None else viewed(value)
    )
    if source is value or source.ndim != 4 or value.ndim != 4 or value.shape[0] != source.shape[0]:
        return None
    side = source.shape[2] // max(value.shape[2], 1)
    n, c, h, w = value.shape
    return source if side > 1 and source.shape == (n, c // side**2, h * side, w * side) else None


def _order(value: Value, source: Value) -> Tensor | None:
    """The channels of `value` in the order of the source's pixels, or None if they are no squares of it.

    Each pixel of a square must be there once.
    """
    n, c, height, width = source.shape
    side = height // value.shape[2]
    positions = torch.arange(source.shape.numel(), dtype=torch.int32, device="cpu").view(source.shape)
    found = _applied(value, source, positions)
    first = found[0, :, 0, 0]
    images, rows, columns = (
        torch.arange(size, dtype=torch.int32, device="cpu") * step
        for size, step in ((n, c * height * width), (found.shape[2], side * width), (found.shape[3], side))
    )
    expected = images[:, None, None, None] + first[:, None, None] + rows[:, None] + columns
    if not torch.equal(found, expected):
        return None
    channel, row, column = first // (height * width), first // width % height, first % width
    if int(row.max()) >= side or int(column.max()) >= side:
        return None
    places, order = ((row * side + column) * c + channel).sort()
    whole = torch.equal(places, torch.arange(len(places), dtype=places.dtype, device="cpu"))
    return order if whole else None


def _applied(value: Value, source: Value, tensor: Tensor) -> Tensor:
    """The tensor as `value` rearranges its source."""
    if value is source:
        return tensor
    node = value.node
    assert node is not None
    first = next(node.reads())
    tensor = _applied(first, source, tensor)
    return node.options["call"].run([tensor])[0] if _is_unshuffle(node) else node.options["apply"](tensor)
