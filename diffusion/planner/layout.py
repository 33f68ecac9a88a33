"""Lays a fused graph out: the calls that compute its values, in order, each in its place."""

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
from .graph import FLOATS, Graph, Node, Value, strided_view
from .placement import Placement, as_map, contiguous, pixels_of
from .weights import Weights

CallOf = tuple[Callable, tuple]

_OUT = {"add": torch.add, "mul": torch.mul, "sub": torch.sub, "div": torch.div}


class Layout:
    """The calls of a graph, each a function and its arguments, and the tensors that they read and write.

    calls: in order. inputs: the buffer of each input of the graph. outputs: the tensor of each output.
    origins: for each call, the node that it is of. unfused: for each call of PyTorch, the node.
    placement: where the values live.
    """

    def __init__(self, graph: Graph, weights: Weights, pool: Pool):
        self.graph, self._weights = graph, weights
        self.placement = Placement(graph, weights, pool)
        self.calls: list[CallOf] = []
        self.origins: list[Node | None] = []
        self._laid_out: Node | None = None
        self.unfused: list[Node] = []
        try:
            self._lay_out()
        finally:
            self.placement.release_all()

    def _lay_out(self) -> None:
        graph = self.graph
        self.inputs = [self.placement.input(value) for value in graph.inputs]
        for i, node in enumerate(graph.visit()):
            lay_out = getattr(self, f"_lay_out_{node.op}", self._lay_out_call)
            self._laid_out = node
            lay_out(node)
            self.placement.release(i)
        self.outputs = [self.placement.tensor(value) for value in graph.outputs]

    # ---- The calls of each op.

    def _record(self, function: Callable, *arguments: object) -> None:
        self.calls.append((function, arguments))
        self.origins.append(self._laid_out)

    def _lay_out_view(self, node: Node) -> None:
        source = self.placement.tensor(next(node.reads()))
        apply = node.options["apply"]
        view = strided_view(apply, source)
        if view is not None:
            self.placement.set(node.output, view)
            return
        # The copy lives as long as what it is a copy of, so that it needs memory of its own.
        copy = torch.empty_like(apply(source))
        self.placement.set(node.output, copy)
        self._record(store, copy, apply, source)

    def _lay_out_affine(self, node: Node) -> None:
        x = self._map(named(node)["x"])
        out = self.placement.block(node.output, (self._weights.affine_rows, *x.shape[:2]))
        self._record_affine(node, x, out)

    def _lay_out_norm(self, node: Node) -> None:
        x = self._map(named(node)["x"])
        out = self.placement.place(node.output)
        shape = (3, *x.shape[:2])
        block = self.placement.pool.take(math.prod(shape) * 4)
        affine = shaped(block, shape, contiguous(shape), torch.float32)
        self._record_affine(node, x, affine)
        self._record(average_pool_, x, affine, node.options["silu"], 1, out)
        self.placement.pool.give_back(block)

    def _record_affine(self, node: Node, x: Tensor, out: Tensor) -> None:
        """A norm as an affine map of each channel, in `out`."""
        inputs = named(node)
        weight, bias = (self._weights.vector(inputs[name]) for name in ("weight", "bias"))
        add, scale, shift = (self._vector(inputs[name]) for name in ("add", "scale", "shift"))
        groups, eps, silu = (node.options[name] for name in ("groups", "eps", "silu"))
        self._record(group_norm_affine_, x, groups, weight, bias, eps, add, scale, shift, silu, out)

    def _lay_out_channel_norm(self, node: Node) -> None:
        inputs, rows = named(node), node.options["rows"]
        strides = contiguous(node.output.shape) if rows else None
        out = pixels_of(self.placement.place(node.output, strides), rows)
        x, residual = (
            None if value is None else self._pixels(self.placement.tensor(value), rows, None, out.dtype)
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
        vector = self.placement.tensor(value)
        if vector.dtype != torch.float32 or vector.stride(-1) != 1:
            single = torch.empty(vector.shape, dtype=torch.float32, device="cpu")
            self._record(copy, single, vector)
            return single
        return vector

    def _lay_out_convolution(self, node: Node) -> None:
        inputs, options = named(node), node.options
        kernel, stride, scale, padding = (options[k] for k in ("kernel", "stride", "scale", "padding"))
        strides = contiguous(node.output.shape) if options["writes_rows"] else None
        out_tensor = self.placement.place(node.output, strides)
        x = inputs["x"]
        assert x is not None
        size = None
        if options["writes_rows"] and not options["reads_rows"]:
            size = tuple(x.shape[2:]) if options["size"] is None else options["size"]
        out = pixels_of(out_tensor, options["writes_rows"], size)
        size = None if not options["reads_rows"] else tuple(out.shape[2:])
        image = self._pixels(self.placement.tensor(x), options["reads_rows"], size, out.dtype)
        if kernel == stride == scale == 1 and image.shape[2:] != out.shape[2:]:
            image = image.flatten(2).unflatten(2, out.shape[2:])
        padded = ([scale * n + 2 * padding + more for n in image.shape[2:]] for more in (0, 1))
        sizes = [[(n - kernel) // stride + 1 for n in size] for size in padded]
        if list(out.shape[2:]) not in sizes:  # the second one has zeros to the right and below
            raise ValueError(f"a convolution of {list(image.shape)} does not give {list(out.shape)}")
        residual = None
        if inputs["residual"] is not None:
            shape = tuple(out.shape[2:])
            residual = self._pixels(
                self.placement.tensor(inputs["residual"]), options["writes_rows"], shape, out.dtype
            )
        weight, activation = inputs["weight"], options["activation"]
        assert weight is not None
        height, width = out.shape[2:]
        gated = activation == "geglu"
        packed = self._weights.packed(
            weight, height, width, out.dtype, winograd=(kernel, stride, padding) == (3, 1, 1), gated=gated
        )
        bias = self._weights.vector(inputs["bias"])
        if gated:
            bias = self._weights.gated_vector(inputs["bias"], packed.packing)
        norm, affine, silu = inputs["affine"], None, False
        if norm is not None and norm.node is not None:
            affine, silu = self.placement.tensor(norm), norm.node.options["silu"]
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
        """A map in channels_last, in the plan's dtype."""
        assert value is not None
        return self._pixels(self.placement.tensor(value), False, None, self._weights.dtype)

    def _cast(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor, or a copy in another dtype."""
        if tensor.dtype == dtype:
            return tensor
        other = torch.empty_like(tensor, dtype=dtype)
        self._record(copy, other, tensor)
        return other

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
        view = as_map(tensor, rows, size)
        if view is not None and dtype in (None, tensor.dtype):
            return view
        plain = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device="cpu")
        if not rows:
            plain = plain.contiguous(memory_format=torch.channels_last)
        self._record(copy, plain, tensor)
        view = as_map(plain, rows, size)
        assert view is not None
        return view

    def _lay_out_attention(self, node: Node) -> None:
        _, heads, positions, width = node.output.shape
        merged = (positions * heads * width, width, heads * width, 1)  # merging the heads copies nothing
        out = self.placement.place(node.output, merged)
        scale = node.options["scale"]
        values = list(node.reads())
        q, k, v = (self.placement.tensor(value) for value in values)
        matching = k.ndim == 4 and k.shape == v.shape == (*q.shape[:2], k.shape[2], width) and k.shape[2] > 0
        dense = all(t.stride(-1) == 1 for t in (q, k, v))
        if not (matching and dense and all(value.dtype in FLOATS for value in values)):
            return self._lay_out_call(node)
        q, k, v = (self._cast(t, out.dtype) for t in (q, k, v))
        fast = q.dtype == torch.bfloat16  # products of bfloat16, where the processor has them
        self._record(attention_, q, k, v, scale, fast, out)
        return None

    def _lay_out_linear_attention(self, node: Node) -> None:
        values = list(node.reads())[:3]
        q, k, v = (self._heads(self._cast(self.placement.tensor(x), self._weights.dtype)) for x in values)
        memory = [self._weights.vector(value) for value in list(node.reads())[3:]] or [None, None]
        _, heads, channels, positions = node.output.shape
        merged = (positions * heads * channels, channels, 1, heads * channels)  # as a map in channels_last
        out = self.placement.place(node.output, merged)
        self._record(linear_attention_, q, k, v, *memory, node.options["scale"], out)

    def _heads(self, tensor: Tensor) -> Tensor:
        """A tensor [N, heads, channels, positions] with neighbouring channels, perhaps a copy."""
        if tensor.shape[2] == 1 or tensor.stride(2) == 1:
            return tensor
        neighbours = torch.empty_like(tensor.mT, memory_format=torch.contiguous_format).mT
        self._record(copy, neighbours, tensor)
        return neighbours

    def _lay_out_squares(self, node: Node) -> None:
        x, out = self._map(next(node.reads())), self.placement.place(node.output)
        _, c, height, width = out.shape
        side = node.options["side"]
        pixels = out.permute(0, 2, 3, 1).unflatten(3, (side, side, c // side**2))
        rows = x.permute(0, 2, 3, 1).unflatten(2, (width, side)).unflatten(1, (height, side))
        self._record(copy, pixels, rows.transpose(2, 3))

    def _lay_out_double(self, node: Node) -> None:
        self._record(upsample_nearest2x_, self._map(next(node.reads())), self.placement.place(node.output))

    def _lay_out_average(self, node: Node) -> None:
        inputs = named(node)
        norm = inputs["affine"]
        affine, silu = None, False
        if norm is not None and norm.node is not None:
            affine, silu = self.placement.tensor(norm), norm.node.options["silu"]
        out = self.placement.place(node.output)
        self._record(average_pool_, self._map(inputs["x"]), affine, silu, 2, out)

    def _lay_out_join(self, node: Node) -> None:
        parts = [self.placement.tensor(value) for value in node.reads()]
        maps = node.output.ndim == 4 and all(part.stride(1) == 1 for part in parts)
        out = self.placement.place(node.output, None if maps else contiguous(node.output.shape))
        dimension, start = node.options["dim"], 0
        for part in parts:
            self._record(copy, out.narrow(dimension, start, part.shape[dimension]), part)
            start += part.shape[dimension]

    def _lay_out_cat(self, node: Node) -> None:
        out, start = self.placement.place(node.output), 0
        for value in node.reads():
            part = out.narrow(1, start, value.shape[1])
            start += value.shape[1]
            if not self.placement.is_part(value, node.output, start - value.shape[1]):
                self._record(copy, part, self.placement.tensor(value))

    def _lay_out_call(self, node: Node) -> None:
        """A call of PyTorch's function, whose results are copied into buffers."""
        self.unfused.append(node)
        template: Template = node.options["call"]
        reads = zip(node.reads(), template.dtypes, strict=True)
        tensors = [self._operand(value, dtype, node) for value, dtype in reads]
        stand_ins = [
            zeros_in_place_of(tensor) if value.constant is None else tensor
            for value, tensor in zip(node.reads(), tensors, strict=True)
        ]
        with torch.no_grad():
            results = template.run(stand_ins)  # for the strides of the results
        outs = []
        for value, result in zip(node.outputs, results, strict=True):
            dense = result.numel() > 1 and torch.empty_like(result).stride() == result.stride()
            outs.append(self.placement.place(value, result.stride() if dense else None))
        function = _OUT.get(node.op)
        if function is not None and len(tensors) == 2 and results[0].dtype == outs[0].dtype:
            self._record(write_binary, outs[0], function, *tensors)
        else:
            self._record(write_results, outs, template, tensors)

    def _operand(self, value: Value, dtype: torch.dtype, node: Node) -> Tensor:
        """An input of PyTorch's function. dtype: in which the network gives it.

        In a plan that narrows the feature maps, a constant is in the dtype of the maps that the function
        reads.
        """
        if not self._weights.narrows:
            return self._cast(self.placement.tensor(value), dtype)
        maps = [other for other in node.reads() if other.constant is None and other.ndim > 2]
        dtypes = {self.placement.dtype(other) for other in maps if other.dtype in FLOATS}
        if value.constant is not None and value.dtype in FLOATS and dtypes == {self._weights.dtype}:
            return self._weights.copy(value, self._weights.dtype)
        return self.placement.tensor(value)


def zeros_in_place_of(tensor: Tensor) -> Tensor:
    """Zeros of its shape and strides, since a buffer may hold numbers that are no valid index."""
    numbers = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    zeros = torch.zeros(numbers if tensor.numel() else 0, dtype=tensor.dtype, device="cpu")
    return zeros.as_strided(tensor.shape, tensor.stride())


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
