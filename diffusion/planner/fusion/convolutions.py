"""Joins convolutions, and linear maps of the channels of each pixel, with what is around them.

A convolution takes in the group normalisation, its modulation and SiLU before it, a doubling or a padding of
its input, and after it the sum with a residual and the number that this is multiplied by. An average of
pixels takes in the normalisation, too.
"""

from typing import Any

import torch

from ..graph import (
    FLOATS,
    Graph,
    Node,
    Value,
    apply_views,
    channels_last_strides,
    is_channels_last,
    leaf_uses,
    map_of,
    rows_of,
    viewed,
)
from .inputs import AVERAGE_INPUTS, CONVOLUTION_INPUTS, factor_of, first_input, is_fusable, other_operand


def fuse_convolutions(graph: Graph) -> None:
    replaced: dict[Node, list[Node]] = {}
    taken: set[Node] = set()
    affines: dict[Node, Node] = {}

    def affine_of(source: Value) -> tuple[Value, Value | None]:
        """The input of a norm and its affine map, which a convolution reads in the place of the norm."""
        before = source.node
        if before is None or before.op != "norm" or not _all_convolve(source):
            return source, None
        if before not in affines:
            affines[before] = Node("affine", before.inputs, [_affine_value(source)], **before.options)
            replaced[before] = [before, affines[before]]  # the norm goes if nobody reads it
        return first_input(before), affines[before].output

    for node in graph.visit():
        if node.op == "average":
            normed = affine_of(map_of(first_input(node)))
            node.remove()
            replaced[node] = [Node("average", normed, node.outputs, names=AVERAGE_INPUTS)]
            continue
        if node.op not in ("conv", "linear") or not is_fusable(node):
            continue
        x, weight, *bias = node.inputs
        assert x is not None
        assert weight is not None
        options: dict[str, Any] = {"kernel": weight.shape[-1] if weight.ndim == 4 else 1, "scale": 1}
        options |= {"stride": node.options.get("stride", 1), "padding": node.options.get("padding", 0)}
        options["activation"] = node.options.get("activation", "none")
        source = rows_of(x) if node.op == "linear" else map_of(x)
        before = source.node
        options["size"] = tuple(node.output.shape[2:]) if node.op == "conv" else None
        padded = (options["kernel"], options["stride"], options["padding"]) == (3, 2, 0)
        if before is not None and before.op == "pad" and padded:
            source = map_of(first_input(before))
            before = source.node
        square = (options["kernel"], options["stride"]) == (3, 1)
        if before is not None and before.op == "double" and square and _all_convolve(source):
            options["scale"], source = 2, map_of(first_input(before))
        source, affine = affine_of(source)
        last, residual, layout, options["factor"] = _sum(node, graph, taken)
        options["reads_rows"] = node.op == "linear" and source is x
        options["writes_rows"] = layout == "rows"
        values = (source, weight, bias[0] if bias else None, affine, residual)
        node.remove()
        last.remove()
        fused = Node("convolution", values, [last.output], names=CONVOLUTION_INPUTS, **options)
        replaced[node] = []
        replaced[last] = [fused]
    graph.nodes = [new for node in graph.nodes for new in replaced.get(node, [node])]
    graph.drop_unused()


def _affine_value(x: Value) -> Value:
    return Value(torch.empty((4, *x.shape[:2]), device="meta"), "the affine map of a norm")


def _all_convolve(value: Value) -> bool:
    """Whether all that reads a map is convolutions that can apply a norm or a doubling as they read it."""
    for user, read in leaf_uses(value):
        rows = user.op == "linear"
        if (rows_of(read) if rows else map_of(read)) is not value or (rows and read is value):
            return False
        if user.op == "double":
            fits = _all_convolve(user.output)
        elif user.op in ("conv", "linear"):
            fits = user.inputs[0] is read and is_fusable(user) and user.options.get("stride", 1) == 1
        else:
            fits = user.op in ("convolution", "average")
        if not fits:
            return False
    return bool(value.users)


def _sum(node: Node, graph: Graph, taken: set[Node]) -> tuple[Node, Value | None, str, float]:
    """The last node that a convolution takes in, and the output (convolution + residual) * factor.

    Returns the node, the residual, the output's `_layout` and the factor.
    """
    last, residual, factor = node, None, 1.0
    layout = "rows" if node.op == "linear" else "map"
    value = node.output
    while len(value.users) == 1 and value not in graph.outputs:
        (user,) = value.users
        if user.op == "view" and residual is None:
            value = user.output
            continue
        seen = layout if residual is not None else _layout(value, node)
        number, other = factor_of(user), other_operand(user, value)
        if user in taken or seen is None or graph.stays_wide(user.output):
            break
        if number is not None:
            factor *= number
        elif residual is None and factor == 1 and _adds(user, value, other, node, graph):
            residual = other
        else:
            break
        taken.add(user)
        last, layout, value = user, seen, user.output
    return last, residual, layout, factor


def _adds(user: Node, value: Value, other: Value | None, node: Node, graph: Graph) -> bool:
    """Whether a node adds to a convolution's output another value that the convolution can read."""
    fits = user.op == "add" and other is not None and other.shape == value.shape and other is not value
    if not fits or other is None or other.dtype not in FLOATS:
        return False
    return not _takes_rather(other, node, graph)


def _layout(value: Value, node: Node) -> str | None:
    """How a value holds the output of a convolution or linear map: "map" [N, C, H, W], or "rows" [..., C].

    None if it holds the numbers in another order than pixel by pixel, or if it is a map of another height and
    width, which only a linear map or a kernel of one can write.
    """
    output, linear = node.output, node.op == "linear"
    if value is output:
        return "rows" if linear else "map"
    channels = output.shape[-1 if linear else 1]
    strides = channels_last_strides(output.shape) if not linear else None
    like = torch.empty(output.shape, device="meta")
    if strides is not None:
        like = torch.empty_strided(output.shape, strides, device="meta")
    seen = apply_views(value, output, like)
    if seen is None or seen.numel() != like.numel() or seen.shape[0] != like.shape[0]:
        return None
    if seen.ndim == 4 and seen.shape[1] == channels and is_channels_last(seen):
        return "map" if linear or seen.shape == output.shape or _maps_pixels(node) else None
    return "rows" if seen.shape[-1] == channels and seen.is_contiguous() else None


def _maps_pixels(node: Node) -> bool:
    """Whether each pixel of a convolution's output is of one pixel of its input."""
    weight = node.inputs[1]
    assert weight is not None
    padded = (node.options.get("stride", 1), node.options.get("padding", 0)) != (1, 0)
    return weight.shape[2:] == (1, 1) and not padded


def _takes_rather(other: Value, node: Node, graph: Graph) -> bool:
    """Whether the other operand of a sum is a larger convolution, which takes the sum in."""
    source = viewed(other).node
    if source is None or source.op not in ("conv", "linear") or not is_fusable(source):
        return False
    alone = len(other.users) == 1 and len(source.output.users) == 1 and other not in graph.outputs
    return alone and _size(source) > _size(node)


def _size(node: Node) -> int:
    weight = node.inputs[1]
    assert weight is not None
    return weight.shape.numel()
