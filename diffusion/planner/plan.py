"""Plan: a network for inputs of one shape, as a fixed list of calls."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..kernels._recorded_calls import recording
from ..kernels.ops.attention.library import attention_
from ..kernels.ops.convolution.library import convolution_, upsample_nearest2x_
from ..kernels.ops.group_norm_silu.library import group_norm_affine_
from ..kernels.ops.layer_norm.library import layer_norm_
from .fusion import fuse, named
from .graph import Graph, Node
from .layout import CallOf, Layout, normalise
from .weights import Weights

_RECORDABLE: dict[Callable, str] = {  # operators whose calls can be recorded, by kind
    group_norm_affine_: "norm",
    convolution_: "convolution",
    attention_: "attention",
    layer_norm_: "norm",
    upsample_nearest2x_: "rest",
}
_KINDS = _RECORDABLE | {normalise: "norm"}


class Plan:
    """The calls of a traced graph, bound to their buffers. The graph is fused, in place.

    inputs, outputs: the buffers, in the order of the graph's. `run` reads the former and writes the latter.
    """

    def __init__(self, graph: Graph, weights: Weights):
        fuse(graph)
        self.graph = graph
        self.layout = Layout(graph, weights)
        self.inputs, self.outputs = self.layout.inputs, self.layout.outputs
        self._bound = _bound(self.layout.calls)

    @property
    def recordable(self) -> bool:
        """Whether `run` consists of calls that can be recorded (`kernels._recorded_calls`), all of them."""
        return all(function in _RECORDABLE for function, _ in self.layout.calls)

    def run(self) -> None:
        for run in self._bound:
            run()

    def evaluate(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The graph's outputs, as tensors of their own, for these inputs."""
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor)
        self.run()
        return [
            out.to(value.dtype, copy=True, memory_format=torch.contiguous_format)
            for out, value in zip(self.outputs, self.graph.outputs, strict=True)
        ]

    def calls(self) -> list[tuple[str, Callable[[], None]]]:
        """The calls, in order, each with its kind, to be timed one by one.

        The kinds are "convolution", "norm", "attention" and "rest".
        """
        return [(_KINDS.get(call[0], "rest"), _bound([call])[0]) for call in self.layout.calls]

    def report(self) -> list[str]:
        """Lines that say what is fused, what is not, and how much memory the plan's buffers take."""
        nodes = self.graph.nodes
        unfused = Counter(_described(node) for node in self.layout.unfused)
        convolutions = [named(node) for node in nodes if node.op == "convolution"]
        normed = sum(inputs["affine"] is not None for inputs in convolutions)
        added = sum(inputs["residual"] is not None for inputs in convolutions)
        attentions = sum(call[0] is attention_ for call in self.layout.calls)
        megabytes = (self.layout.pool.bytes + sum(t.nbytes for t in self.inputs)) / 1e6
        return [
            f"  {len(self.layout.calls)} calls, {megabytes:.1f} MB of buffers",
            f"  {len(convolutions)} convolutions and linear maps, {normed} with the norm before them and "
            f"{added} with the sum after them; {attentions} attentions",
            *(f"  not fused: {count} x {what}" for what, count in unfused.most_common()),
        ]


def _described(node: Node) -> str:
    """The function of PyTorch that a node calls, and the size of its output."""
    function = node.options["call"].function
    return f"{getattr(function, '__name__', function)} {list(node.outputs[0].shape)}"


def _bound(calls: list[CallOf]) -> list[Callable[[], None]]:
    """Functions that run the calls, those of neighbouring compiled operators as one recording."""
    bound: list[Callable[[], None]] = []
    for recordable, group in itertools.groupby(calls, lambda call: call[0] in _RECORDABLE):
        if recordable:
            with recording() as recorded:
                for function, arguments in group:
                    function(*arguments)
            bound.append(recorded.run)
        else:
            bound += [partial(function, *arguments) for function, arguments in group]
    return bound
