"""Joins the nodes of a graph into calls of the compiled ops.

A convolution, or a linear map of the channels of each pixel, takes in the group normalisation, its modulation
and SiLU before it, a doubling or a padding of its input, and the sum with a residual after it. Nodes become

affine       the affine map of each channel that a group normalisation is; options: groups, eps, silu
norm         the same, applied; for what is no convolution
convolution  options: kernel, stride, padding, scale (2 where each pixel is read as 2 x 2)

whose inputs have the names of options["names"].
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .graph import Graph, Node, Value, apply_views, channels_last_strides, is_channels_last, map_of, viewed
from .lowering import FLOATS, Reshape

NORM_INPUTS = ("x", "weight", "bias", "add", "scale", "shift")
CONVOLUTION_INPUTS = ("x", "weight", "bias", "affine", "residual")


def fuse(graph: Graph) -> None:
    """Joins the nodes of the graph, in place."""
    _fold_constants(graph)
    _share_equal(graph)
    _normalise_maps(graph)
    _fuse_norms(graph)
    _fuse_convolutions(graph)
    graph.drop_unused()
    _join_siblings(graph)


def named(node: Node) -> dict[str, Value | None]:
    """The inputs of a fused node by name."""
    return dict(zip(node.options["names"], node.inputs, strict=True))


# ---- Constants, and what is computed twice.


def _fold_constants(graph: Graph) -> None:
    """Computes now what depends on constants alone, such as a standardised weight."""
    kept = []
    for node in graph.nodes:
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


def _share_equal(graph: Graph) -> None:
    """Computes an activation of one value once, where several blocks ask for it."""
    first: dict[tuple, Value] = {}
    for node in list(graph.nodes):
        if node.op not in ("silu", "gelu") or len(node.inputs) != 1 or node.output in graph.outputs:
            continue
        key = (node.op, node.inputs[0], node.options.get("approximate"))
        if first.setdefault(key, node.output) is not node.output:
            for user in list(node.output.users):
                user.replace_input(node.output, first[key])
            node.remove()
            graph.nodes.remove(node)


# ---- Norms.


def _normalise_maps(graph: Graph) -> None:
    """Lets a group normalisation of a view [N, C, H W] read the map [N, C, H, W] itself."""
    for node in list(graph.nodes):
        if node.op != "group_norm" or node.output.ndim != 3 or node.output in graph.outputs:
            continue
        x = node.inputs[0]
        assert x is not None
        source = viewed(x)
        if source.ndim != 4 or source.shape[:2] != x.shape[:2] or source.shape.numel() != x.shape.numel():
            continue
        like = torch.empty(source.shape, device="meta")  # the view keeps the order of pixels if this one does
        seen = apply_views(x, source, like)
        if seen is None or not seen.is_contiguous():
            continue
        whole = Value(torch.empty(source.shape, dtype=node.output.dtype, device="meta"))
        options = {name: node.options[name] for name in ("call", "groups", "eps")}
        view = Node("view", [whole], [node.output], apply=Reshape(node.output.shape))
        node.remove()
        new = Node("group_norm", [source, *node.inputs[1:]], [whole], **options)
        position = graph.nodes.index(node)
        graph.nodes[position : position + 1] = [new, view]


class _Norm(NamedTuple):
    """A group normalisation with all that follows it up to `output`."""

    nodes: list[Node]
    inputs: tuple[Value | None, ...]  # NORM_INPUTS
    silu: bool
    output: Value


def _fuse_norms(graph: Graph) -> None:
    replaced: dict[Node, Node | None] = {}
    for node in graph.nodes:
        if node.op != "group_norm" or node.output.ndim != 4:
            continue
        norm = _parsed(node, graph)
        options = {"groups": node.options["groups"], "eps": node.options["eps"], "silu": norm.silu}
        replaced |= dict.fromkeys(norm.nodes)
        for old in norm.nodes:
            old.remove()
        replaced[norm.nodes[-1]] = Node("norm", norm.inputs, [norm.output], names=NORM_INPUTS, **options)
    graph.nodes = [new for node in graph.nodes if (new := replaced.get(node, node)) is not None]


def _parsed(node: Node, graph: Graph) -> _Norm:
    x, *affine = node.inputs
    weight, bias = (*affine, None, None)[:2]
    assert x is not None
    nodes, output = [node], node.output
    add = scale = shift = None
    silu = False
    before = x.node
    if before is not None and before.op == "add" and x.users == [node] and x not in graph.outputs:
        split = _map_and_vector(before)
        if split is not None:
            x, add = split
            nodes.insert(0, before)
    while len(output.users) == 1 and output not in graph.outputs and not silu:
        (user,) = output.users
        if user.op == "view" and user.output.shape == output.shape and map_of(user.output) is map_of(output):
            pass
        elif user.op == "mul" and scale is None and shift is None:
            scale = _vector(_other(user, output), output, plus_one=True)
            if scale is None:
                break
        elif user.op == "add" and shift is None:
            shift = _vector(_other(user, output), output)
            if shift is None:
                break
        elif user.op == "silu":
            silu = True
        else:
            break
        nodes.append(user)
        output = user.output
    return _Norm(nodes, (x, weight, bias, add, scale, shift), silu, output)


def _other(node: Node, value: Value) -> Value | None:
    """The other operand of a binary node, or None for a number."""
    if len(node.inputs) != 2:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def _map_and_vector(node: Node) -> tuple[Value, Value] | None:
    """The operands of a sum of a map and of one number for each image and channel, if it is that."""
    if len(node.inputs) == 2:
        for map_, other in (node.inputs, node.inputs[::-1]):
            assert map_ is not None
            if map_.shape == node.output.shape:
                vector = _vector(other, map_)
                if vector is not None:
                    return map_, vector
    return None


def _vector(value: Value | None, like: Value, plus_one: bool = False) -> Value | None:
    """The value [N, C] of which this one is a view [N, C, 1, 1], for a map `like`; None if it is no such.

    plus_one: of which this one is a view with 1 added.
    """
    n, c = like.shape[:2]
    chain = []
    while value is not None and (value.shape != (n, c) or plus_one):
        node = value.node
        if node is None:
            return _constant_vector(value, n, c, plus_one)
        if node.op == "add" and node.options["scalar"] == 1 and plus_one:
            plus_one = False
        elif node.op == "view":
            chain.append(node.options["apply"])
        else:
            return None
        value = node.inputs[0]
    if value is None or value.dtype not in FLOATS:
        return None
    tensor = torch.empty_strided((n, c), (c, 1), device="meta")
    for apply in reversed(chain):
        tensor = apply(tensor)
    wide = tensor.shape == (n, c) + (1,) * (like.ndim - 2)
    ordered = (c == 1 or tensor.stride()[1] == 1) and (n == 1 or tensor.stride()[0] == c)
    return value if wide and ordered else None


def _constant_vector(value: Value, n: int, c: int, plus_one: bool) -> Value | None:
    """A constant [N or 1, C, 1, ...] as a constant [N, C], less 1 for `plus_one`; None for another value."""
    constant = value.constant
    if constant is None or constant.dtype not in FLOATS or constant.ndim < 3:
        return None
    if constant.shape[0] not in (1, n) or constant.shape[1] != c or constant.numel() != constant.shape[0] * c:
        return None
    vector = constant.detach().float().flatten(1).expand(n, c) - (1 if plus_one else 0)
    return Value(vector, "a constant vector", constant=vector)


# ---- Convolutions.


def _fuse_convolutions(graph: Graph) -> None:
    replaced: dict[Node, list[Node]] = {}
    taken: set[Node] = set()
    affines: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op not in ("conv", "linear") or not _is_fusable(node):
            continue
        x, weight, *bias = node.inputs
        assert x is not None
        assert weight is not None
        options = {"kernel": weight.shape[-1] if weight.ndim == 4 else 1, "scale": 1}
        options |= {"stride": node.options.get("stride", 1), "padding": node.options.get("padding", 0)}
        source = map_of(x)
        before = source.node
        if before is not None and before.op == "pad" and (options["stride"], options["padding"]) == (2, 0):
            source = map_of(_first(before))
            before = source.node
        if before is not None and before.op == "double" and options["stride"] == 1 and options["kernel"] == 3:
            if _all_convolve(source):
                options["scale"], source = 2, map_of(_first(before))
            before = source.node
        affine = None
        if before is not None and before.op == "norm" and _all_convolve(source):
            if before not in affines:
                affines[before] = Node("affine", before.inputs, [_affine_value(source)], **before.options)
                replaced[before] = [before, affines[before]]  # the norm goes if nobody reads it
            affine, source = affines[before].output, _first(before)
        last, residual, layout = _residual(node, graph, taken)
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


def _first(node: Node) -> Value:
    first = node.inputs[0]
    assert first is not None
    return first


def _affine_value(x: Value) -> Value:
    return Value(torch.empty((4, *x.shape[:2]), device="meta"), "the affine map of a norm")


def _is_fusable(node: Node) -> bool:
    x, weight = node.inputs[:2]
    assert x is not None
    assert weight is not None
    fits = x.dtype in FLOATS and x.ndim >= 3 and weight.constant is not None and 0 not in x.shape
    constant_bias = len(node.inputs) < 3 or node.inputs[2] is None or node.inputs[2].constant is not None
    return fits and constant_bias and weight.ndim in (2, 4)


def _leaf_uses(value: Value) -> Iterator[tuple[Node, Value]]:
    """The nodes that read a value or a view of it, each with what it reads."""
    for user in value.users:
        if user.op == "view":
            yield from _leaf_uses(user.output)
        else:
            yield user, value


def _all_convolve(value: Value) -> bool:
    """Whether all that reads a map is convolutions that can apply a norm or a doubling as they read it."""
    for user, read in _leaf_uses(value):
        if map_of(read) is not value:
            return False
        if user.op == "double":
            fits = _all_convolve(user.output)
        elif user.op in ("conv", "linear"):
            fits = user.inputs[0] is read and _is_fusable(user) and user.options.get("stride", 1) == 1
        else:
            fits = user.op == "convolution"
        if not fits:
            return False
    return bool(value.users)


def _residual(node: Node, graph: Graph, taken: set[Node]) -> tuple[Node, Value | None, str]:
    """The last node that a convolution takes in, the value that it adds, and the output's `_layout`."""
    value = node.output
    while len(value.users) == 1 and value not in graph.outputs:
        (user,) = value.users
        if user.op == "view":
            value = user.output
            continue
        other = _other(user, value)
        fits = user.op == "add" and other is not None and other.shape == value.shape and user not in taken
        layout = _layout(value, node)
        if not fits or other is None or other is value or layout is None:
            break
        if other.dtype not in FLOATS or _takes_rather(other, node, graph):
            break
        taken.add(user)
        return user, other, layout
    return node, None, "rows" if node.op == "linear" else "map"


def _layout(value: Value, node: Node) -> str | None:
    """How a value holds the output of a convolution or linear map: "map" [N, C, H, W], or "rows" [..., C].

    None if it holds the numbers in another order than pixel by pixel.
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
    if seen is None or seen.numel() != like.numel():
        return None
    if seen.ndim == 4 and seen.shape[1] == channels and is_channels_last(seen):
        return "map"
    return "rows" if seen.shape[-1] == channels and seen.is_contiguous() else None


def _takes_rather(other: Value, node: Node, graph: Graph) -> bool:
    """Whether the other operand of a sum is a larger convolution, which takes the sum in."""
    source = viewed(other).node
    if source is None or source.op not in ("conv", "linear") or not _is_fusable(source):
        return False
    alone = len(other.users) == 1 and len(source.output.users) == 1 and other not in graph.outputs
    return alone and _size(source) > _size(node)


def _size(node: Node) -> int:
    weight = node.inputs[1]
    assert weight is not None
    return weight.shape.numel()


# ---- Linear maps of the same input.


def _join_siblings(graph: Graph) -> None:
    """Makes one convolution of several linear maps of the same pixels, such as queries, keys and values."""
    groups: dict[tuple, list[Node]] = {}
    for node in graph.nodes:
        if node.op != "convolution" or node.options["kernel"] != 1 or node.output in graph.outputs:
            continue
        inputs = named(node)
        if inputs["residual"] is None and (node.options["stride"], node.options["scale"]) == (1, 1):
            groups.setdefault((inputs["x"], inputs["affine"], node.output.ndim), []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            _join(graph, nodes)


def _join(graph: Graph, nodes: list[Node]) -> None:
    first = nodes[0]
    weights, biases = ([named(node)[name] for node in nodes] for name in ("weight", "bias"))
    tensors = [value.constant for value in weights if value is not None and value.constant is not None]
    sizes = [tensor.shape[0] for tensor in tensors]
    weight = torch.cat([tensor.detach().flatten(1) for tensor in tensors])
    bias = None
    if any(value is not None for value in biases):
        parts = [
            tensor.new_zeros(size) if value is None or value.constant is None else value.constant.detach()
            for value, size, tensor in zip(biases, sizes, tensors, strict=True)
        ]
        bias = Value(torch.cat(parts), "joined biases", constant=torch.cat(parts))
    channel = 1 if first.output.ndim == 4 else first.output.ndim - 1
    shape = list(first.output.shape)
    shape[channel] = sum(sizes)
    joined = Value(torch.empty(shape, dtype=first.output.dtype, device="meta"))
    inputs = named(first)
    values = (inputs["x"], Value(weight, "joined weights", constant=weight), bias, inputs["affine"], None)
    position = graph.nodes.index(first)
    options = {key: value for key, value in first.options.items() if key != "names"}
    for node in nodes:
        node.remove()
        graph.nodes.remove(node)
    new = [Node("convolution", values, [joined], names=CONVOLUTION_INPUTS, **options)]
    start = 0
    for node, size in zip(nodes, sizes, strict=True):
        new.append(Node("view", [joined], [node.output], apply=_Range(channel, start, size)))
        start += size
    graph.nodes[position:position] = new


class _Range(NamedTuple):
    """A range of a tensor along one dimension."""

    dimension: int
    start: int
    size: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dimension, self.start, self.size)
