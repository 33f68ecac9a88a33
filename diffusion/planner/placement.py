"""Gives each value of a fused graph the memory that it lives in, as long as something reads it."""

import math

import torch
from torch import Tensor

from .buffers import Pool, shaped
from .fusion import named
from .graph import FLOATS, Graph, Node, Value, channels_last_strides, leaf_uses
from .weights import Weights

# Ops of nodes that compiled operators compute, with maps and rows in the plan's dtype.
COMPILED = {"affine", "norm", "channel_norm", "convolution", "attention", "linear_attention", "squares"}
COMPILED |= {"double", "average", "join", "cat"}
# Ops that can write a range of channels.
_WRITES_RANGES = ("convolution", "norm", "channel_norm", "double", "average", "squares", "call")


class Placement:
    """The tensors of a graph's values, in memory that serves again where nothing reads it any more.

    pool: the memory, perhaps also of other plans that never run at the same time.
    """

    def __init__(self, graph: Graph, weights: Weights, pool: Pool):
        self._graph, self._weights = graph, weights
        self.pool = pool
        self._tensors: dict[Value, Tensor] = {}
        self._blocks: dict[Value, Tensor] = {}  # of the values that own one
        self._dtypes: dict[Value, torch.dtype] = {}
        self._homes = self._find_homes()
        self._ends = self._find_ends()

    def release(self, position: int) -> None:
        """Gives back the memory that nothing reads after the node at this position of the graph's list."""
        for owner in self._ends.get(position, ()):
            if owner in self._blocks:
                self.pool.give_back(self._blocks.pop(owner))

    def release_all(self) -> None:
        """Gives back all memory, for other plans; this one writes what it reads, the inputs aside."""
        for block in self._blocks.values():
            self.pool.give_back(block)
        self._blocks.clear()

    def _find_homes(self) -> dict[Value, tuple[Value, int | None]]:
        """The value in whose memory another one is written, and from which channel on.

        An input of a concatenation is written in its place, and a residual where the sum will be, for which
        the channel is None.
        """
        homes: dict[Value, tuple[Value, int | None]] = {}
        outputs = set(self._graph.outputs)

        def free(value: Value, ops: tuple[str, ...] = _WRITES_RANGES) -> bool:
            made = value.node is not None and value.node.op in ops and not writes_rows(value.node)
            return made and value not in homes and value not in outputs and value.ndim == 4

        for node in self._graph.nodes:
            if node.op == "cat":
                start = 0
                for value in node.reads():
                    if free(value):
                        homes[value] = node.output, start
                    start += value.shape[1]
            elif node.op == "convolution":
                residual, out = named(node)["residual"], node.output
                made = residual is not None and free(residual, ("convolution", "double", "average"))
                if residual is None or not made or residual.users != [node]:
                    continue
                if residual.shape == out.shape and not node.options["writes_rows"]:
                    homes[residual] = out, None
        return homes

    def _owner(self, value: Value) -> Value:
        """The value that owns the memory of this one, if every view shares memory."""
        while True:
            if value.node is not None and value.node.op == "view":
                value = next(value.node.reads())
            elif value in self._homes:
                value = self._homes[value][0]
            else:
                return value

    def _find_ends(self) -> dict[int, list[Value]]:
        """After each node, the owners whose memory is not read any more."""
        last: dict[Value, int] = {}
        for i, node in enumerate(self._graph.nodes):
            for value in [*node.reads(), *node.outputs]:
                last[self._owner(value)] = i
        for value in self._graph.outputs:
            last.pop(self._owner(value), None)
        ends: dict[int, list[Value]] = {}
        for value, i in last.items():
            ends.setdefault(i, []).append(value)
        return ends

    def dtype(self, value: Value) -> torch.dtype:
        """The plan's dtype for maps and rows that compiled operators read or write.

        All others have their own: vectors [N, C], whole numbers, what is computed from these alone, and what
        PyTorch's functions alone read and write, such as a denoiser's image, which would lose digits. In a
        plan that narrows the feature maps, what PyTorch's functions compute from them is as narrow.
        """
        if value not in self._dtypes:
            self._dtypes[value] = self._found_dtype(value)
        return self._dtypes[value]

    def _found_dtype(self, value: Value) -> torch.dtype:
        node, dtype = value.node, self._weights.dtype
        if value.ndim <= 2 or value.dtype not in FLOATS:
            return value.dtype
        if node is not None and node.op == "view":
            return self.dtype(next(node.reads()))
        if self._graph.stays_wide(value):
            return value.dtype
        compiled = node is not None and is_compiled(node)
        if compiled or any(is_compiled(user) and read.ndim > 2 for user, read in leaf_uses(value)):
            return dtype
        if node is None or not self._weights.narrows:
            return value.dtype
        maps = [x for x in node.reads() if x.constant is None and x.ndim > 2 and x.dtype in FLOATS]
        return dtype if maps and all(self.dtype(x) == dtype for x in maps) else value.dtype

    def input(self, value: Value) -> Tensor:
        tensor = torch.zeros(tuple(value.shape), dtype=self.dtype(value), device="cpu")
        if value.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        self._tensors[value] = tensor
        return tensor

    def tensor(self, value: Value) -> Tensor:
        """The tensor of a value that is there already."""
        if value not in self._tensors:
            assert value.constant is not None
            self._tensors[value] = self._weights.copy(value)
        return self._tensors[value]

    def place(self, value: Value, strides: tuple[int, ...] | None = None) -> Tensor:
        """The tensor that a value is written into: its part of another one, or a block of its own.

        strides: of a block of its own; by default channels_last for maps, and contiguous.
        """
        if value in self._tensors:
            return self._tensors[value]
        if value in self._homes:
            whole, start = self._homes[value]
            tensor = self.place(whole)
            if start is not None:
                tensor = tensor.narrow(1, start, value.shape[1])
        else:
            dtype = self.dtype(value)
            if strides is None:
                strides = channels_last_strides(value.shape) if value.ndim == 4 else contiguous(value.shape)
            block = self.pool.take(math.prod(value.shape) * dtype.itemsize)
            self._blocks[value] = block
            tensor = shaped(block, value.shape, strides, dtype)
        self._tensors[value] = tensor
        return tensor

    def set(self, value: Value, tensor: Tensor) -> None:
        """Lets a value live in memory of another one, or in memory of its own outside the pool."""
        self._tensors[value] = tensor

    def block(self, value: Value, shape: tuple[int, ...]) -> Tensor:
        """A contiguous float32 tensor for what a value stands for, such as the affine map of a norm."""
        block = self.pool.take(math.prod(shape) * 4)
        self._blocks[value] = block
        self._tensors[value] = tensor = shaped(block, shape, contiguous(shape), torch.float32)
        return tensor

    def is_part(self, value: Value, whole: Value, start: int) -> bool:
        """Whether a value is written in place of its range of channels of a concatenation."""
        return self._homes.get(value) == (whole, start)


def is_compiled(node: Node) -> bool:
    return node.op in COMPILED


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def writes_rows(node: Node) -> bool:
    """Whether the node writes rows [..., C], not a map."""
    return bool(node.options.get("writes_rows") or node.options.get("rows"))


def pixels_of(tensor: Tensor, rows: bool, size: tuple[int, ...] | None = None) -> Tensor:
    """`as_map` of a tensor that an operator writes."""
    view = as_map(tensor, rows, size)
    if view is None:
        raise ValueError("the pixels of an output are not at one distance")
    return view


def as_map(tensor: Tensor, rows: bool, size: tuple[int, ...] | None) -> Tensor | None:
    """The tensor as a view [N, C, H, W] with pixels at one distance; None if it has no such view."""
    if rows:
        n, c = tensor.shape[0], tensor.shape[-1]
        positions = tensor.numel() // max(n * c, 1)
        height, width = size or (positions, 1)
        try:
            tensor = tensor.view(n, height, width, c).permute(0, 3, 1, 2)
        except RuntimeError:  # the rows are not at one distance
            return None
    n, c, h, w = tensor.shape
    steps = tensor.stride()
    pixel = steps[3] if w > 1 else steps[2] if h > 1 else steps[0] if n > 1 else c
    right = [(c, 1, 1), (w, 3, pixel), (h, 2, pixel * w), (n, 0, pixel * w * h)]
    if pixel < c or any(count > 1 and steps[dim] != step for count, dim, step in right):
        return None
    return tensor.as_strided(tensor.shape, (pixel * w * h, 1, pixel * w, pixel), tensor.storage_offset())
