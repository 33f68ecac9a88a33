"""Plan: a network for inputs of one shape, as a fixed list of calls."""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ..kernels._recorded_calls import recording
from ..kernels.ops.attention.library import attention_
from ..kernels.ops.convolution.library import average_pool_, convolution_, upsample_nearest2x_
from ..kernels.ops.group_norm_silu.library import group_norm_affine_
from ..kernels.ops.layer_norm.library import layer_norm_
from ..kernels.ops.linear_attention.library import linear_attention_
from . import report
from .buffers import Pool
from .faults import without_faults
from .fusion import fuse
from .graph import Graph, Node
from .layout import CallOf, Layout
from .weights import Weights

_RECORDABLE: dict[Callable, str] = {  # operators whose calls can be recorded, by kind
    group_norm_affine_: "norm",
    convolution_: "convolution",
    layer_norm_: "norm",
    attention_: "attention",
    linear_attention_: "attention",
    upsample_nearest2x_: "rest",
    average_pool_: "rest",
}


class Plan:
    """The calls of a traced graph, bound to their buffers. The graph is fused, in place.

    inputs, outputs: the buffers, in the order of the graph's. `run` reads the former and writes the latter.
    pool: of the buffers other than inputs. Plans of one pool must not run at the same time, and a run
    overwrites the outputs of the others.
    """

    def __init__(self, graph: Graph, weights: Weights, pool: Pool | None = None):
        self.graph, self._weights = graph, weights
        self._pool = Pool() if pool is None else pool
        graph.dtype = None if weights.narrows else weights.dtype
        self.layout, self._bound = without_faults(graph, self._make)
        self.inputs, self.outputs = self.layout.inputs, self.layout.outputs

    def _make(self) -> tuple[Layout, list[Callable[[], None]]]:
        fuse(self.graph)
        layout = Layout(self.graph, self._weights, self._pool)
        return layout, _bound(layout.calls, layout.origins, self.graph)

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
        return [
            (_RECORDABLE.get(call[0], "rest"), _bound([call], [None], self.graph)[0])
            for call in self.layout.calls
        ]

    def report(self, calls: bool = False) -> list[str]:
        """Lines that say what is fused, what is not, and how much memory and work the plan is.

        calls: a line for each call follows.
        """
        lines = report.summary(self.layout, self._weights.packed_bytes())
        return lines + (report.table(self.layout) if calls else [])


def _bound(calls: list[CallOf], origins: list[Node | None], graph: Graph) -> list[Callable[[], None]]:
    """Functions that run the calls, those of neighbouring compiled operators as one recording.

    origins: the node of each call, noted in the graph while the operator checks its arguments.
    """
    bound: list[Callable[[], None]] = []
    pairs = zip(calls, origins, strict=True)
    for recordable, group in itertools.groupby(pairs, lambda pair: pair[0][0] in _RECORDABLE):
        if recordable:
            with recording() as recorded:
                for (function, arguments), origin in group:
                    graph.visited = origin
                    function(*arguments)
            bound.append(recorded.run)
        else:
            bound += [partial(function, *arguments) for (function, arguments), _ in group]
    graph.visited = None
    return bound
