"""The graph of a network: values, and the nodes that compute them.

`trace` makes it from a network, `fusion` joins its nodes, and `layout` turns it into calls.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Value:
    """A tensor that a network computes, reads or is given.

    example: a tensor of its shape and dtype, without data where the network was traced without. node: the one
    that computes it, or None. name: of a parameter, a buffer or an argument, for messages. constant: the
    tensor itself, of a parameter, a buffer or another tensor that the network holds; else None.
    """

    def __init__(self, example: Tensor, name: str = "", constant: Tensor | None = None):
        self.shape, self.dtype = example.shape, example.dtype
        self.name, self.constant = name, constant
        self.node: Node | None = None
        self.users: list[Node] = []

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __repr__(self) -> str:
        return f"{self.name or 'value'} {list(self.shape)}"


class Node:
    """One operation on values.

    op: a name of `lowering`; "call" for a torch function that has none. inputs: the values that it reads; an
    absent one is None. options: its other arguments. outputs: the values that it computes, most often one.
    """

    def __init__(self, op: str, inputs: Iterable[Value | None], outputs: list[Value], **options: Any):
        self.op, self.inputs, self.outputs, self.options = op, list(inputs), outputs, options
        for value in self.reads():
            value.users.append(self)
        for value in outputs:
            value.node = self

    def reads(self) -> Iterator[Value]:
        return (value for value in self.inputs if value is not None)

    @property
    def output(self) -> Value:
        (value,) = self.outputs
        return value

    def own_options(self) -> dict[str, Any]:
        """The options without the call, for a node with another one."""
        return {name: value for name, value in self.options.items() if name != "call"}

    def replace_input(self, old: Value, new: Value) -> None:
        new.users += [self] * sum(value is old for value in self.inputs)
        self.inputs = [new if value is old else value for value in self.inputs]
        old.users = [user for user in old.users if user is not self]

    def remove(self) -> None:
        """Takes the node out of its inputs' users; its place in the graph's list is the caller's matter."""
        for value in set(self.reads()):
            value.users = [user for user in value.users if user is not self]

    def __repr__(self) -> str:
        return f"{self.op} {[list(value.shape) for value in self.outputs]}"


class Graph:
    """nodes: in the order in which they run. inputs: the tensors that vary from call to call.

    dtype: that of the feature maps in a plan that computes as the network does; None in a plan that is to be
    faster. visited: the node at which the planner is. read: constants whose numbers the network's own code
    may have read, so that the graph depends on them.
    """

    def __init__(self, nodes: list[Node], inputs: list[Value], outputs: list[Value]):
        self.nodes, self.inputs, self.outputs = nodes, inputs, outputs
        self.dtype: torch.dtype | None = None
        self.visited: Node | None = None
        self.read: list[Value] = []

    def visit(self) -> Iterator[Node]:
        """The present nodes, each noted as `visited` meanwhile."""
        for node in list(self.nodes):
            self.visited = node
            yield node
        self.visited = None

    def stays_wide(self, value: Value) -> bool:
        """Whether the network reads a value, or returns it, in a wider dtype than that of the feature maps.

        Such values are computed in their own dtype. Others that are wide are only narrowed again.
        """
        if self.dtype is None or value.dtype not in FLOATS or value.dtype.itemsize <= self.dtype.itemsize:
            return False
        if value in self.outputs:
            return True
        for user in value.users:
            if user.op == "view" and self.stays_wide(user.output):
                return True
            if user.op != "view" and "call" in user.options:
                read = zip(user.reads(), user.options["call"].dtypes, strict=True)
                if any(x is value and dtype.itemsize > self.dtype.itemsize for x, dtype in read):
                    return True
        return False

    def constants(self) -> list[Tensor]:
        """The tensors of the network on which the graph and its outputs depend."""
        values = {value for node in self.nodes for value in node.reads()} | {*self.outputs, *self.read}
        return [value.constant for value in values if value.constant is not None]

    def rounds_to_16_bits(self) -> bool:
        """Whether a node makes floating-point numbers of 16 bits of other ones."""
        return any(
            any(map(_is_narrow, node.outputs)) and not any(map(_is_narrow, node.inputs))
            for node in self.nodes
        )

    def drop_unused(self) -> None:
        """Removes the nodes whose outputs nobody reads."""
        needed = set(self.outputs)
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if needed.isdisjoint(node.outputs):
                node.remove()
            else:
                needed.update(node.reads())
                kept.append(node)
        self.nodes = kept[::-1]


def _is_narrow(value: Value | None) -> bool:
    return value is not None and value.dtype in FLOATS and value.dtype.itemsize == 2


def is_view(node: Node | None) -> bool:
    """Whether the node gives its first input in another shape, order or range, without a computation."""
    return node is not None and node.op == "view"


def leaf_uses(value: Value) -> Iterator[tuple[Node, Value]]:
    """The nodes that read a value or a view of it, each with what it reads."""
    for user in value.users:
        if user.op == "view":
            yield from leaf_uses(user.output)
        else:
            yield user, value


def viewed(value: Value) -> Value:
    """The value of which this one is a view, perhaps itself."""
    while is_view(value.node):
        assert value.node is not None
        first = value.node.inputs[0]
        assert first is not None
        value = first
    return value


def apply_views(value: Value, source: Value, tensor: Tensor) -> Tensor | None:
    """`value` as a view of `tensor`, which is in the place of `source`; None where it would be a copy."""
    chain: list[Callable[[Tensor], Tensor]] = []
    while value is not source:
        if not is_view(value.node):
            return None
        assert value.node is not None
        chain.append(value.node.options["apply"])
        value = next(value.node.reads())
    for apply in reversed(chain):
        result = apply(tensor)
        if not shares_memory(result, tensor):
            return None
        tensor = result
    return tensor


def strided_view(apply: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor | None:
    """`apply(tensor)` as a view of the tensor's memory, or None if it is no such view.

    Unlike PyTorch's views, it is found where `apply` reshapes to what would be a copy and then further to
    what is a view again, such as heads merged with the images of a batch and then with the channels.
    """
    seen = apply(tensor)
    if shares_memory(seen, tensor) or seen.numel() == 0:
        return seen if shares_memory(seen, tensor) else None
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    positions = torch.arange(extent, dtype=torch.int32, device="cpu")
    found = apply(positions.as_strided(tensor.shape, tensor.stride()))
    start = int(found.flatten()[0])
    expected, strides = torch.tensor(start, dtype=torch.int32, device="cpu"), []
    for dimension, size in enumerate(found.shape):
        line = found[tuple(slice(None) if d == dimension else 0 for d in range(found.ndim))]
        strides.append(int(line[1] - line[0]) if size > 1 else 1)
        steps = torch.arange(size, dtype=torch.int32, device="cpu") * strides[-1]
        expected = expected.unsqueeze(-1) + steps
    if min(strides, default=0) < 0 or not torch.equal(found, expected):
        return None
    return tensor.as_strided(found.shape, strides, tensor.storage_offset() + start)


def shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def channels_last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a map [N, C, H, W] in channels_last."""
    _, c, h, w = shape
    return h * w * c, 1, w * c, c


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a map [N, C, H, W] has the strides of channels_last, in dimensions of more than one entry."""
    expected = channels_last_strides(tensor.shape)
    return all(n == 1 or a == b for n, a, b in zip(tensor.shape, tensor.stride(), expected, strict=True))


def map_of(value: Value) -> Value:
    """The map [N, C, H, W] that this value shows as it is, by views; for other values, the value itself."""
    source, seen = _map_behind(value)
    same = seen is not None and seen.shape == source.shape and is_channels_last(seen)
    return source if same else value


def rows_of(value: Value) -> Value:
    """The map [N, C, H, W] whose pixels' channels are the rows of this value, in their order.

    Views [N, H W, C] and [N, H, W, C] of a map in channels_last are such rows; for other values, the value
    itself.
    """
    source, seen = _map_behind(value)
    rows = seen is not None and seen.shape[-1] == source.shape[1] and seen.is_contiguous()
    return source if rows else value


def _map_behind(value: Value) -> tuple[Value, Tensor | None]:
    """The map of which this value is a view, and the view of such a map in channels_last.

    None: it is no view of a map, not of all of it, or not image by image.
    """
    source = viewed(value)
    heads = source.node is not None and source.node.op in ("attention", "linear_attention")
    if heads or source.ndim != 4 or value.ndim not in (3, 4) or value is source:
        return source, None
    like = torch.empty_strided(source.shape, channels_last_strides(source.shape), device="meta")
    seen = apply_views(value, source, like)
    if seen is None or seen.numel() != like.numel() or seen.shape[0] != source.shape[0]:
        return source, None
    return source, seen
