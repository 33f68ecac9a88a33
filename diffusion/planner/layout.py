"""Lays a fused graph out: a buffer for each value, and the calls that compute them in order."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.ops.attention.library import attention_
from ..kernels.ops.convolution.library import (
    average_pool_,
    convolution_,
    convolution_arguments,
    upsample_nearest2x_,
)
from ..kernels.ops.group_norm_silu.library import group_norm_affine_
from ..kernels.ops.layer_norm.library import layer_norm_
from ..kernels.ops.linear_attention.library import linear_attention_
from .buffers import Pool, shaped
from .calls import Template
from .fusion import named
from .graph import FLOATS, Graph, Node, Value, channels_last_strides, leaf_uses, strided_view
from .weights import Weights

CallOf = tuple[Callable, tuple]

_WRITES_RANGES = (
    "convolution",
    "norm",
    "channel_norm",
    "double",
    "average",
    "squares",
    "call",
)  # ops that can write a range of channels
_OUT = {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "div": torch.div}


class Layout:
    """The calls of a graph, each a function and its arguments, and the tensors that they read and write.

    calls: in order. inputs: the buffer of each input of the graph. outputs: the tensor of each output.
    origins: for each call, the node that it is of. unfused: for each call of PyTorch, the node. pool: the
    memory.
    """

    def __init__(self, graph: Graph, weights: Weights):
        self.graph, self._weights = graph, weights
        self.pool = Pool()
        self.calls: list[CallOf] = []
        self.origins: list[Node | None] = []
        self._laid_out: Node | None = None
        self.unfused: list[Node] = []
        self._tensors: dict[Value, Tensor] = {}
        self._blocks: dict[Value, Tensor] = {}  # of the values that own one
        self._dtypes: dict[Value, torch.dtype] = {}
        self._homes = self._find_homes()
        ends = self._find_ends()
        self.inputs = [self._input(value) for value in graph.inputs]
        for i, node in enumerate(graph.nodes):
            lay_out = getattr(self, f"_lay_out_{node.op}", self._lay_out_call)
            self._laid_out = node
            lay_out(node)
            for owner in ends.get(i, ()):
                if owner in self._blocks:
                    self.pool.give_back(self._blocks.pop(owner))
        self.outputs = [self._tensor(value) for value in graph.outputs]

    # ---- Where values live.

    def _find_homes(self) -> dict[Value, tuple[Value, int | None]]:
        """The value in whose memory another one is written, and from which channel on.

        An input of a concatenation is written in its place, and a residual where the sum will be, for which
        the channel is None.
        """
        homes: dict[Value, tuple[Value, int | None]] = {}
        outputs = set(self.graph.outputs)

        def free(value: Value, ops: tuple[str, ...] = _WRITES_RANGES) -> bool:
            made = value.node is not None and value.node.op in ops and not _writes_rows(value.node)
            return made and value not in homes and value not in outputs and value.ndim == 4

        for node in self.graph.nodes:
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
        for i, node in enumerate(self.graph.nodes):
            for value in [*node.reads(), *node.outputs]:
                last[self._owner(value)] = i
        for value in self.graph.outputs:
            last.pop(self._owner(value), None)
        ends: dict[int, list[Value]] = {}
        for value, i in last.items():
            ends.setdefault(i, []).append(value)
        return ends

    def dtype(self, value: Value) -> torch.dtype:
        """The plan's dtype for maps and rows that compiled operators read or write, and what follows.

        All others have their own: vectors [N, C], whole numbers, what is computed from these alone, and what
        PyTorch's functions alone read and write, such as a denoiser's image, which would lose digits.
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
        compiled = node is not None and _is_compiled(node)
        if compiled or any(_is_compiled(user) and read.ndim > 2 for user, read in leaf_uses(value)):
            return dtype
        if node is None:
            return value.dtype
        maps = [x for x in node.reads() if x.constant is None and x.ndim > 2 and x.dtype in FLOATS]
        return dtype if maps and all(self.dtype(x) == dtype for x in maps) else value.dtype

    def _input(self, value: Value) -> Tensor:
        tensor = torch.zeros(tuple(value.shape), dtype=self.dtype(value), device="cpu")
        if value.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        self._tensors[value] = tensor
        return tensor

    def _tensor(self, value: Value) -> Tensor:
        """The tensor of a value that is there already."""
        if value not in self._tensors:
            assert value.constant is not None
            self._tensors[value] = self._weights.copy(value)
        return self._tensors[value]

    def _place(self, value: Value, strides: tuple[int, ...] | None = None) -> Tensor:
        """The tensor that a value is written into: its part of another one, or a block of its own.

        strides: of a block of its own; by default channels_last for maps, and contiguous.
        """
        if value in self._tensors:
            return self._tensors[value]
        if value in self._homes:
            whole, start = self._homes[value]
            tensor = self._place(whole)
            if start is not None:
                tensor = tensor.narrow(1, start, value.shape[1])
        else:
            dtype = self.dtype(value)
            if strides is None:
                strides = channels_last_strides(value.shape) if value.ndim == 4 else _contiguous(value.shape)
            block = self.pool.take(math.prod(value.shape) * dtype.itemsize)
            self._blocks[value] = block
            tensor = shaped(block, value.shape, strides, dtype)
        self._tensors[value] = tensor
        return tensor

    # ---- The calls of each op.

    def _record(self, function: Callable, *arguments: object) -> None:
        self.calls.append((function, arguments))
        self.origins.append(self._laid_out)

    def _lay_out_view(self, node: Node) -> None:
        source = self._tensor(next(node.reads()))
        apply = node.options["apply"]
        view = strided_view(apply, source)
        if view is not None:
            self._tensors[node.output] = view
            return
        # The copy lives as long as what it is a copy of, so that it needs memory of its own.
        copy = torch.empty_like(apply(source))
        self._tensors[node.output] = copy
        self._record(store, copy, apply, source)

    def _lay_out_affine(self, node: Node) -> None:
        x = self._map(named(node)["x"])
        shape = (self._weights.affine_rows, *x.shape[:2])
        block = self.pool.take(math.prod(shape) * 4)
        self._blocks[node.output] = block
        out = shaped(block, shape, _contiguous(shape), torch.float32)
        self._tensors[node.output] = out
        self._record_affine(node, x, out)

    def _lay_out_norm(self, node: Node) -> None:
        x = self._map(named(node)["x"])
        out = self._place(node.output)
        shape = (3, *x.shape[:2])
        block = self.pool.take(math.prod(shape) * 4)
        affine = shaped(block, shape, _contiguous(shape), torch.float32)
        self._record_affine(node, x, affine)
        self._record(average_pool_, x, affine, node.options["silu"], 1, out)
        self.pool.give_back(block)

    def _record_affine(self, node: Node, x: Tensor, out: Tensor) -> None:
        """A norm as an affine map of each channel, in `out`."""
        inputs = named(node)
        weight, bias = (self._weights.vector(inputs[name]) for name in ("weight", "bias"))
        add, scale, shift = (self._vector(inputs[name]) for name in ("add", "scale", "shift"))
        groups, eps, silu = (node.options[name] for name in ("groups", "eps", "silu"))
        self._record(group_norm_affine_, x, groups, weight, bias, eps, add, scale, shift, silu, out)

    def _lay_out_channel_norm(self, node: Node) -> None:
        inputs, rows = named(node), node.options["rows"]
        strides = _contiguous(node.output.shape) if rows else None
        out = _pixels_of(self._place(node.output, strides), rows)
        x, residual = (
            None if value is None else self._pixels(self._tensor(value), rows, None, out.dtype)
            for value in (inputs["x"], inputs["residual"])
        )
        weight, bias = (self._weights.vector(inputs[name]) for name in ("weight", "bias"))
        scale, shift = (self._vector(inputs[name]) for name in ("scale", "shift"))
        eps, rms, silu = (node.options[name] for name in ("eps", "rms", "silu"))
        self._record(layer_norm_, x, weight, bias, eps, rms, out, scale, shift, silu, residual)

    def _vector(self, value: Value | None) -> Tensor | None:
        """A value [N, C] in float32, as the norm adds it or scales by it."""
        if value is None:
            return None
        vector = self._tensor(value)
        if vector.dtype != torch.float32 or vector.stride(-1) != 1:
            single = torch.empty(vector.shape, dtype=torch.float32, device="cpu")
            self._record(copy, single, vector)
            return single
        return vector

    def _lay_out_convolution(self, node: Node) -> None:
        inputs, options = named(node), node.options
        kernel, stride, scale, padding = (options[k] for k in ("kernel", "stride", "scale", "padding"))
        strides = _contiguous(node.output.shape) if options["writes_rows"] else None
        out_tensor = self._place(node.output, strides)
        x = inputs["x"]
        assert x is not None
        size = None
        if options["writes_rows"] and not options["reads_rows"]:
            size = tuple(x.shape[2:]) if options["size"] is None else options["size"]
        out = _pixels_of(out_tensor, options["writes_rows"], size)
        size = None if not options["reads_rows"] else tuple(out.shape[2:])
        image = self._pixels(self._tensor(x), options["reads_rows"], size, out.dtype)
        if kernel == stride == scale == 1 and image.shape[2:] != out.shape[2:]:
            image = image.flatten(2).unflatten(2, out.shape[2:])
        residual = None
        if inputs["residual"] is not None:
            shape = tuple(out.shape[2:])
            residual = self._pixels(
                self._tensor(inputs["residual"]), options["writes_rows"], shape, out.dtype
            )
        weight, activation = inputs["weight"], options["activation"]
        assert weight is not None
        height, width = out.shape[2:]
        gated = activation == "geglu"
        packed = self._weights.packed(
            weight, height, width, out.dtype, winograd=kernel == 3 and stride == 1, gated=gated
        )
        bias = self._weights.vector(inputs["bias"])
        if gated:
            bias = self._weights.gated_vector(inputs["bias"], packed.packing)
        norm, affine, silu = inputs["affine"], None, False
        if norm is not None and norm.node is not None:
            affine, silu = self._tensor(norm), norm.node.options["silu"]
        arguments = convolution_arguments(
            image,
            packed,
            out,
            stride=stride,
            padding=padding,
            scale=scale,
            bias=bias,
            affine=affine,
            silu=silu,
            residual=residual,
            activation=activation,
            factor=options["factor"],
        )
        self._record(convolution_, *arguments)

    def _map(self, value: Value | None) -> Tensor:
        assert value is not None
        return self._pixels(self._tensor(value), False)

    def _pixels(
        self,
        tensor: Tensor,
        rows: bool,
        size: tuple[int, ...] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A map in channels_last, or a range of one's channels, of a tensor [N, C, H, W] or of rows [..., C].

        size: height and width, for rows; by default all rows of an image in one column. dtype: of the map;
        by default the tensor's.
        """
        view = _as_map(tensor, rows, size)
        if view is not None and dtype in (None, tensor.dtype):
            return view
        plain = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="cpu")
        if not rows:
            plain = plain.contiguous(memory_format=torch.channels_last)
        self._record(copy, plain, tensor)
        view = _as_map(plain, rows, size)
        assert view is not None
        return view

    def _lay_out_attention(self, node: Node) -> None:
        q, k, v = (self._tensor(value) for value in node.reads())
        _, heads, positions, width = node.output.shape
        merged = (positions * heads * width, width, heads * width, 1)  # merging the heads copies nothing
        out = self._place(node.output, merged)
        scale = node.options["scale"]
        matching = k.ndim == 4 and k.shape == v.shape == (*q.shape[:2], k.shape[2], width) and k.shape[2] > 0
        same = matching and q.dtype == k.dtype == v.dtype
        dense = all(t.stride(-1) == 1 for t in (q, k, v))
        if not (same and dense and q.dtype in FLOATS):
            return self._lay_out_call(node)
        fast = q.dtype == torch.bfloat16  # products of bfloat16, where the processor has them
        self._record(attention_, q, k, v, scale, fast, out)
        return None

    def _lay_out_linear_attention(self, node: Node) -> None:
        q, k, v = (self._heads(self._tensor(value)) for value in list(node.reads())[:3])
        memory = [self._weights.vector(value) for value in list(node.reads())[3:]] or [None, None]
        _, heads, channels, positions = node.output.shape
        merged = (positions * heads * channels, channels, 1, heads * channels)  # as a map in channels_last
        out = self._place(node.output, merged)
        self._record(linear_attention_, q, k, v, *memory, node.options["scale"], out)

    def _heads(self, tensor: Tensor) -> Tensor:
        """A tensor [N, heads, channels, positions] with neighbouring channels, perhaps a copy."""
        if tensor.shape[2] == 1 or tensor.stride(2) == 1:
            return tensor
        neighbours = torch.empty_like(tensor.mT, memory_format=torch.contiguous_format).mT
        self._record(copy, neighbours, tensor)
        return neighbours

    def _lay_out_squares(self, node: Node) -> None:
        x, out = self._map(next(node.reads())), self._place(node.output)
        _, c, height, width = out.shape
        side = node.options["side"]
        pixels = out.permute(0, 2, 3, 1).unflatten(3, (side, side, c // side**2))
        rows = x.permute(0, 2, 3, 1).unflatten(2, (width, side)).unflatten(1, (height, side))
        self._record(copy, pixels, rows.transpose(2, 3))

    def _lay_out_double(self, node: Node) -> None:
        self._record(upsample_nearest2x_, self._map(next(node.reads())), self._place(node.output))

    def _lay_out_average(self, node: Node) -> None:
        inputs = named(node)
        norm = inputs["affine"]
        affine, silu = None, False
        if norm is not None and norm.node is not None:
            affine, silu = self._tensor(norm), norm.node.options["silu"]
        self._record(average_pool_, self._map(inputs["x"]), affine, silu, 2, self._place(node.output))

    def _lay_out_join(self, node: Node) -> None:
        parts = [self._operand(value, node) for value in node.reads()]
        maps = node.output.ndim == 4 and all(part.stride(1) == 1 for part in parts)
        out = self._place(node.output, None if maps else _contiguous(node.output.shape))
        dimension, start = node.options["dim"], 0
        for part in parts:
            self._record(copy, out.narrow(dimension, start, part.shape[dimension]), part)
            start += part.shape[dimension]

    def _lay_out_cat(self, node: Node) -> None:
        out, start = self._place(node.output), 0
        for value in node.reads():
            part = out.narrow(1, start, value.shape[1])
            start += value.shape[1]
            if self._homes.get(value) != (node.output, start - value.shape[1]):
                self._record(copy, part, self._tensor(value))

    def _lay_out_call(self, node: Node) -> None:
        """A call of PyTorch's function, whose results are copied into buffers."""
        self.unfused.append(node)
        template: Template = node.options["call"]
        tensors = [self._operand(value, node) for value in node.reads()]
        with torch.no_grad():
            results = template.run(tensors)
        outs = []
        for value, result in zip(node.outputs, results, strict=True):
            dense = result.numel() > 1 and torch.empty_like(result).stride() == result.stride()
            outs.append(self._place(value, result.stride() if dense else None))
        function = _OUT.get(node.op)
        if function is not None and len(tensors) == 2 and results[0].dtype == outs[0].dtype:
            self._record(write_binary, outs[0], function, *tensors)
        else:
            self._record(write_results, outs, template, tensors)

    def _operand(self, value: Value, node: Node) -> Tensor:
        """An input of PyTorch's function; a constant in the dtype of the maps that the function reads."""
        maps = [other for other in node.reads() if other.constant is None and other.ndim > 2]
        dtypes = {self.dtype(other) for other in maps if other.dtype in FLOATS}
        if value.constant is not None and value.dtype in FLOATS and dtypes == {self._weights.dtype}:
            return self._weights.copy(value, self._weights.dtype)
        return self._tensor(value)


def _is_compiled(node: Node) -> bool:
    return node.op not in ("view", "call") and hasattr(Layout, f"_lay_out_{node.op}")


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _writes_rows(node: Node) -> bool:
    """Whether the node writes rows [..., C], not a map."""
    return bool(node.options.get("writes_rows") or node.options.get("rows"))


def _pixels_of(tensor: Tensor, rows: bool, size: tuple[int, ...] | None = None) -> Tensor:
    """`_as_map` of a tensor that an operator writes."""
    view = _as_map(tensor, rows, size)
    if view is None:
        raise ValueError("the pixels of an output are not at one distance")
    return view


def _as_map(tensor: Tensor, rows: bool, size: tuple[int, ...] | None) -> Tensor | None:
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


# ---- Functions that calls consist of, beside the compiled operators.


def copy(out: Tensor, x: Tensor) -> None:
    out.copy_(x)


def store(out: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    out.copy_(function(x))


def write_binary(out: Tensor, function: Callable, a: Tensor, b: Tensor) -> None:
    function(a, b, out=out)


def write_results(outs: list[Tensor], template: Template, tensors: list[Tensor]) -> None:
    for out, result in zip(outs, template.run(tensors), strict=True):
        out.copy_(result)
