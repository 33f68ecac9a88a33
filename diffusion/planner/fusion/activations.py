"""Joins a convolution or linear map with the activation of its output: SiLU, GELU, or GEGLU."""

import torch

from ..graph import Graph, Node, Value, apply_views
from ..view_functions import Reshape
from .inputs import is_fusable, other_operand


def fuse_activations(graph: Graph) -> None:
    """Gives each convolution whose output is only read by an activation the option `activation`.

    It is a name of kernels.ops.convolution.library.ACTIVATIONS.
    """
    for node in graph.visit():
        if node.op in ("conv", "linear") and is_fusable(node):
            _take_activation(node, graph)
            if node.op == "linear":
                _take_gates(node, graph)


def _take_activation(node: Node, graph: Graph) -> None:
    """Moves SiLU or GELU into the node; views between them stay, since an activation commutes with them."""
    value = node.output
    while len(value.users) == 1 and value not in graph.outputs:
        (user,) = value.users
        if user.op == "view":
            value = user.output
            continue
        if user.op not in ("silu", "gelu") or graph.stays_wide(user.output):
            break
        exact = user.op == "silu" or user.options["approximate"] == "none"
        node.options["activation"] = user.op if exact else "gelu_tanh"
        user.remove()
        same = Node("view", [value], [user.output], apply=Reshape(value.shape))
        graph.nodes[graph.nodes.index(user)] = same
        break


def _take_gates(node: Node, graph: Graph) -> None:
    """Moves GEGLU into the node: values * gelu(gates), of the halves of its output's channels.

    Source: Shazeer 2020, "GLU variants improve transformer", arXiv:2002.05202, as diffusers has it.
    """
    whole = node.output
    if len(whole.users) != 2 or whole in graph.outputs or whole.shape[-1] % 2:
        return
    half = whole.shape[-1] // 2
    ranges = {_range_of(user, whole): user for user in whole.users}
    first, second = ranges.get((0, half)), ranges.get((half, half))
    if first is None or second is None:
        return
    values, gates = first.output, second.output
    if len(values.users) != 1 or len(gates.users) != 1:
        return
    gelu, product = gates.users[0], values.users[0]
    if gelu.op != "gelu" or gelu.options["approximate"] != "none" or product.op != "mul":
        return
    gated = gelu.output
    alone = gated.users == [product] and {values, gates, gated}.isdisjoint(graph.outputs)
    if not alone or other_operand(product, values) is not gated or graph.stays_wide(product.output):
        return
    for old in (node, first, second, gelu, product):
        old.remove()
    new = Node("linear", node.inputs, [product.output], **node.options, activation="geglu")
    graph.nodes[graph.nodes.index(product)] = new
    graph.nodes = [old for old in graph.nodes if old not in (node, first, second, gelu)]


def _range_of(user: Node, whole: Value) -> tuple[int, int] | None:
    """The first channel and the number of channels that a view takes of the last dimension of a value."""
    if user.op != "view":
        return None
    like = torch.empty(whole.shape, device="meta")
    seen = apply_views(user.output, whole, like)
    if seen is None or seen.shape[:-1] != whole.shape[:-1] or seen.stride() != like.stride():
        return None
    return int(seen.storage_offset()), seen.shape[-1]
