"""Joins a node with those that follow it, one after another, into one node."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ..graph import Graph, Node, Value


class Joined(NamedTuple):
    """Nodes in their order, of which the last one computes `output`, and what the node in their place has."""

    nodes: list[Node]
    inputs: tuple[Value | None, ...]
    output: Value
    options: dict[str, Any]


def join_following(
    graph: Graph, op: str, names: tuple[str, ...], join: Callable[[Node], Joined | None]
) -> None:
    """Puts one node with this op in the place of the nodes that `join` finds for a node, or None.

    names: of the inputs. An input can be a new view, with a node in no graph.
    """
    replaced: dict[Node, list[Node]] = {}
    known = set(graph.nodes)
    for node in graph.visit():
        joined = None if node in replaced else join(node)
        if joined is None or graph.stays_wide(joined.output):
            continue
        replaced |= {old: [] for old in joined.nodes}
        for old in joined.nodes:
            old.remove()
        fused = Node(op, joined.inputs, [joined.output], names=names, **joined.options)
        views = [value.node for value in fused.reads() if value.node is not None and value.node.op == "view"]
        replaced[joined.nodes[-1]] = [*(view for view in views if view not in known), fused]
        known.update(views)
    graph.nodes = [new for node in graph.nodes for new in replaced.get(node, [node])]
