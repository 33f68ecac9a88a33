"""Joins a layer norm or RMS norm of each pixel's channels, as functions write it, with what follows it."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..graph import FLOATS, Graph, Node, Value, shares_memory
from .following import Joined, join_following
from .inputs import CHANNEL_NORM_INPUTS, first_input, other_operand
from .norms import channel_constant, vector_of

SMALL = 1e-10  # largest length below which x / length is bounded that counts as a guard against zeros


class _Core(NamedTuple):
    """A norm of x over its dimension `channel`, times `factor`."""

    x: Value
    channel: int  # the second one of maps [N, C, H, W], or the last one of rows [..., C]
    eps: float
    rms: bool
    factor: float = 1.0
    weight: Tensor | None = None
    bias: Tensor | None = None


def fuse_channel_norms(graph: Graph) -> None:
    """Makes one node of each norm over channels, with its weight, modulation, SiLU and a sum after it."""
    join_following(graph, "channel_norm", CHANNEL_NORM_INPUTS, lambda node: _joined(node, graph))
    graph.drop_unused()


# ---- The norm itself.


def _is_map(core: _Core) -> bool:
    """Whether the channels are those of a map [N, C, H, W], not the last dimension of rows."""
    return core.x.ndim == 4 and core.channel == 1


def _core(node: Node) -> _Core | None:
    """The norm that ends at this node, without weights."""
    x = node.inputs[0] if node.inputs else None
    if x is None:
        return None
    if node.op == "layer_norm":
        affine = [value for value in node.inputs[1:] if value is not None]
        constants = [value.constant.detach().float() for value in affine if value.constant is not None]
        if len(constants) < len(affine):
            return None
        eps, rms = node.options["eps"], node.options["rms"]
        return _Core(x, x.ndim - 1, eps, rms, 1.0, *constants)
    channels = [x.ndim - 1, 1] if x.ndim == 4 else [x.ndim - 1] * (x.ndim > 1)
    if node.op == "normalize" and node.options["dim"] in channels and 0 <= node.options["eps"] <= SMALL:
        c = x.shape[node.options["dim"]]
        return _Core(x, node.options["dim"], node.options["eps"] ** 2 / c, True, c**-0.5)
    if node.op not in ("mul", "div") or len(node.inputs) != 2:
        return None
    for a, b in [node.inputs] if node.op == "div" else [node.inputs, node.inputs[::-1]]:
        assert a is not None
        assert b is not None
        if a.shape == node.output.shape and b.ndim == a.ndim and a is not b:
            for channel in channels:
                core = _quotient(a, b, 1.0 if node.op == "mul" else -1.0, channel)
                if core is not None:
                    return core
    return None


def _reduced(node: Node | None, op: str, channel: int) -> Value | None:
    """The operand of a mean, variance or length over the channels alone; None for another node."""
    if node is None or node.op != op or not node.options["keepdim"] or node.options["dims"] != (channel,):
        return None
    return first_input(node)


def _quotient(a: Value, b: Value, power: float, channel: int) -> _Core | None:
    """The norm that is a * b^power, for b a power of the variance, mean square or length of each pixel."""
    node = b.node
    while node is not None and node.op == "power":
        power, b = power * node.options["exponent"], first_input(node)
        node = b.node
    if node is not None and node.op == "at_least" and power == -1:
        c = a.shape[channel]
        least = node.options["least"]
        of_a = _reduced(first_input(node).node, "length", channel) is a and 0 <= least <= SMALL
        return _Core(a, channel, least**2 / c, True, c**-0.5) if of_a else None
    eps = 0.0
    if node is not None and node.op == "add" and node.options["scalar"] is not None:
        eps = node.options["scalar"]
        node = first_input(node).node
    if power != -0.5:
        return None
    centred = _centred(a, channel)
    if centred is not None and _reduced(node, "variance", channel) is centred:
        return _Core(centred, channel, eps, False)
    squares = _reduced(node, "mean", channel)
    if squares is not None and _is_square(squares.node, a):
        return _Core(a, channel, eps, True) if centred is None else _Core(centred, channel, eps, False)
    return None


def _centred(value: Value, channel: int) -> Value | None:
    """x, if the value is x less the mean of its channels."""
    node = value.node
    if node is None or node.op != "sub" or len(node.inputs) != 2:
        return None
    x, mean = node.inputs
    assert mean is not None
    return x if x is not None and _reduced(mean.node, "mean", channel) is x else None


def _is_square(node: Node | None, x: Value) -> bool:
    if node is not None and node.op == "power" and node.options["exponent"] == 2:
        return first_input(node) is x
    return node is not None and node.op == "mul" and node.inputs == [x, x]


# ---- What follows it.


def _joined(node: Node, graph: Graph) -> Joined | None:
    """The norm that ends at this node, with what follows it; None for another node."""
    core = _core(node) if len(node.outputs) == 1 else None
    if core is None or core.x.dtype not in FLOATS or 0 in core.x.shape:
        return None
    weight = torch.full((core.x.shape[core.channel],), core.factor, dtype=torch.float32, device="cpu")
    if core.weight is not None:
        weight = weight * core.weight
    bias = core.bias
    nodes, output = [node], node.output
    scale = shift = residual = None
    silu = False
    while len(output.users) == 1 and output not in graph.outputs and residual is None:
        (user,) = output.users
        other = other_operand(user, output) if user.op in ("mul", "add") else None
        constant = None if scale is not None else channel_constant(other, core.x, core.channel)
        if user.op == "view" and _changes_nothing(user):
            pass
        elif silu or user.output.shape != output.shape:
            residual = _residual(user, output, other)
            if residual is None:
                break
        elif user.op in ("mul", "div") and other is None and user.options.get("scalar") is not None:
            factor = user.options["scalar"] if user.op == "mul" else 1 / user.options["scalar"]
            if scale is not None or shift is not None:
                break
            weight = weight * factor
            bias = None if bias is None else bias * factor
        elif user.op == "mul" and constant is not None and shift is None:
            weight = weight * constant
            bias = None if bias is None else bias * constant
        elif user.op == "add" and constant is not None and shift is None:
            bias = constant if bias is None else bias + constant
        elif user.op == "mul" and scale is None and shift is None and _is_map(core):
            scale = vector_of(other, output, plus_one=True)
            if scale is None:
                break
        elif user.op == "add" and shift is None:
            shift = vector_of(other, output) if _is_map(core) else None
            residual = _residual(user, output, other) if shift is None else None
            if shift is None and residual is None:
                break
        elif user.op == "silu":
            silu = True
        else:
            break
        nodes.append(user)
        output = user.output
    values = [None if t is None else Value(t, "of a norm", constant=t) for t in (weight, bias)]
    options = {"eps": core.eps, "rms": core.rms, "silu": silu, "rows": not _is_map(core)}
    return Joined(nodes, (core.x, *values, scale, shift, residual), output, options)


def _changes_nothing(view: Node) -> bool:
    like = torch.empty(first_input(view).shape, device="meta")
    seen = view.options["apply"](like)
    return shares_memory(seen, like) and seen.shape == like.shape and seen.stride() == like.stride()


def _residual(node: Node, value: Value, other: Value | None) -> Value | None:
    """The operand that a sum adds to a norm, if it is as large and no constant."""
    if node.op != "add" or other is None or other is value or other.shape != value.shape:
        return None
    return other if other.dtype in FLOATS and other.constant is None else None
