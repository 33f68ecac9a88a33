"""Makes the views of a graph few: each a view of a computed tensor itself, and none that changes nothing."""

import torch

from ..graph import Graph, Node, shares_memory
from ..view_functions import Chain


def shorten_views(graph: Graph) -> None:
    """Replaces a view that only another view reads by one of its source, and one that changes nothing by it.

    Copies on the way can then cancel each other out: see `graph.strided_view`.
    """
    graph.drop_unused()
    for node in graph.visit():
        if node.op != "view":
            continue
        source = next(node.reads())
        before = source.node
        if (
            before is not None
            and before.op == "view"
            and source.users == [node]
            and source not in graph.outputs
        ):
            chain = Chain((before.options["apply"], node.options["apply"]))
            node.options["apply"] = chain
            node.replace_input(source, next(before.reads()))
        if node.output not in graph.outputs and _changes_nothing(node):
            for user in set(node.output.users):
                user.replace_input(node.output, next(node.reads()))
    graph.drop_unused()


def _changes_nothing(node: Node) -> bool:
    source = next(node.reads())
    if node.output.shape != source.shape:
        return False
    like = torch.empty(source.shape, device="meta")
    seen = node.options["apply"](like)
    in_order = all(n == 1 or a == b for n, a, b in zip(seen.shape, seen.stride(), like.stride(), strict=True))
    return shares_memory(seen, like) and in_order and seen.storage_offset() == 0
