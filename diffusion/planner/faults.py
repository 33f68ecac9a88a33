"""Leaves to PyTorch the nodes at which the planner fails, so that all others are planned."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from ..utils.memory import is_out_of_memory
from .graph import Graph, Node, Value

T = TypeVar("T")
MAX_FAULTS = 16  # of a graph


def without_faults(graph: Graph, make: Callable[[], T]) -> T:
    """The result of `make`, which changes the graph. Where it fails, the nodes at fault stay plain calls.

    The options of such a node have the reason. The error is raised where no node is at fault, or too many.
    """
    for _ in range(MAX_FAULTS):
        traced = _Traced(graph)
        try:
            return make()
        except Exception as error:
            failed = graph.visited
            if failed is None or is_out_of_memory(error):
                raise
            text = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
            if not traced.leave(failed, text[:200]):
                raise
    return make()


class _Traced:
    """A graph as it is now, to which it can return."""

    def __init__(self, graph: Graph):
        self._graph = graph
        self._nodes = [(node, node.op, node.inputs, node.outputs, dict(node.options)) for node in graph.nodes]
        values = {*graph.inputs, *graph.outputs}
        for node in graph.nodes:
            values.update(node.reads(), node.outputs)
        self._values = {value: (value.node, list(value.users), value.constant) for value in values}

    def leave(self, failed: Node, reason: str) -> bool:
        """Returns to the graph, with the nodes that became `failed` as plain calls; False if they are."""
        first, last = self._before(failed.reads()), self._after(failed.outputs)
        for node, op, inputs, outputs, options in self._nodes:
            node.op, node.inputs, node.outputs, node.options = op, inputs, outputs, options
        for value, (made, users, constant) in self._values.items():
            value.node, value.users, value.constant = made, users, constant
        self._graph.nodes = [node for node, *_ in self._nodes]
        self._graph.visited = None
        found = [node for node in _between(first, last) if node.op not in ("call", "view")]
        for node in found:
            node.op, node.options = "call", {"call": node.options["call"], "reason": reason}
        return bool(found)

    def _before(self, values: Iterable[Value]) -> set[Value]:
        """The values of the graph that new values come from, or that they are."""
        found: set[Value] = set()
        for value in values:
            if value in self._values:
                found.add(value)
            elif value.node is not None:
                found |= self._before(value.node.reads())
        return found

    def _after(self, values: Iterable[Value]) -> set[Value]:
        """The values of the graph that new values lead to, or that they are."""
        found: set[Value] = set()
        for value in values:
            if value in self._values:
                found.add(value)
            else:
                found |= self._after(output for user in value.users for output in user.outputs)
        return found


def _between(first: set[Value], last: set[Value]) -> list[Node]:
    """The nodes by which the last values are computed from the first ones."""
    found: list[Node] = []
    open_values = list(last)
    while open_values:
        node = open_values.pop().node
        if node is not None and node not in found:
            found.append(node)
            open_values += (value for value in node.reads() if value not in first)
    return found
