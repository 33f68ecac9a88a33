"""Leaves to PyTorch what a network of 16 bits computes in float32."""

from ..graph import Graph

_OPS = ("conv", "conv1d", "linear", "attention", "double", "average", "cat", "join", "pad")


def leave_wide(graph: Graph) -> None:
    """Makes plain calls of the nodes of these ops whose outputs would be rounded to the plan's dtype."""
    for node in graph.visit():
        if node.op in _OPS and graph.stays_wide(node.output):
            node.op = "call"
