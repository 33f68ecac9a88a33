"""Computes what depends on constants alone, and drops what is computed twice."""

import torch
from torch import Tensor

from ..graph import Graph, Node, Value


def fold_constants(graph: Graph) -> None:
    """Computes now what depends on constants alone, such as a standardised weight."""
    kept = []
    for node in graph.visit():
        constants = [value.constant for value in node.reads()]
        fixed = [constant for constant in constants if constant is not None]
        if len(fixed) < len(constants) or any(value in graph.outputs for value in node.outputs):
            kept.append(node)
            continue
        with torch.no_grad():
            result = _computed(node, [constant.detach() for constant in fixed])
        for value, tensor in zip(node.outputs, result, strict=True):
            value.constant, value.node = tensor, None
        node.remove()
    graph.nodes = kept


def _computed(node: Node, tensors: list[Tensor]) -> list[Tensor]:
    if node.op == "view":
        return [node.options["apply"](tensors[0])]
    return node.options["call"].run(tensors)


def share_equal(graph: Graph) -> None:
    """Computes an activation of one value once, where several blocks ask for it."""
    first: dict[tuple, Value] = {}
    for node in graph.visit():
        if node.op not in ("silu", "gelu") or len(node.inputs) != 1 or node.output in graph.outputs:
            continue
        key = (node.op, node.inputs[0], node.options.get("approximate"))
        if first.setdefault(key, node.output) is not node.output:
            for user in list(node.output.users):
                user.replace_input(node.output, first[key])
            node.remove()
            graph.nodes.remove(node)
