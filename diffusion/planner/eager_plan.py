"""EagerPlan: a network as calls of PyTorch, with this package's kernels for norms and attention."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import attention, group_norm_silu
from .fusion import fuse_norms_alone, named
from .fusion.inputs import NORM_INPUTS
from .graph import Graph, Node, Value, viewed


class _Step(NamedTuple):
    """A node's call. inputs, outputs: places of its tensors. ends: of those that nobody reads after it."""

    run: Callable[[list[Tensor]], list[Tensor]]
    inputs: list[int]
    outputs: list[int]
    dtypes: list[torch.dtype]
    ends: list[int]


class EagerPlan:
    """The calls of a traced graph on tensors that PyTorch allocates, for devices with a caching allocator.

    A group normalisation with its modulation and SiLU is one call of `kernels.group_norm_silu`, attention
    without a mask one of `kernels.attention`; every other call is PyTorch's. It can be captured as a CUDA
    graph once it has run. The graph is fused, in place. Weights are read at each call.

    autocast: computes in bfloat16 by the rules of `torch.autocast`.
    """

    def __init__(self, graph: Graph, device: torch.device, autocast: bool):
        fuse_norms_alone(graph)
        self._device, self._autocast = device, autocast
        self._places: dict[Value, int] = {}
        self._constants: list[tuple[int, Tensor]] = []
        self._inputs = [self._place(value) for value in graph.inputs]
        last = {value: node for node in graph.nodes for value in [*node.reads(), *node.outputs]}
        kept = set(graph.outputs)
        self._calls = Counter(map(_kind, graph.nodes))
        self._described = [repr(node) for node in graph.nodes if node.op != "view"]
        self._steps = []
        for node in graph.nodes:
            inputs, outputs = ([self._place(v) for v in values] for values in (node.reads(), node.outputs))
            ended = {value for value in [*node.reads(), *node.outputs] if last[value] is node} - kept
            ends = [self._place(value) for value in ended if value.constant is None]
            dtypes = [value.dtype for value in node.outputs]
            self._steps.append(_Step(_call_of(node), inputs, outputs, dtypes, ends))
        # A view of an input or of a weight is not the caller's own.
        owned = [viewed(value).node is not None for value in graph.outputs]
        places = [(self._place(value), value.dtype) for value in graph.outputs]
        self._outputs = [(*place, not own) for place, own in zip(places, owned, strict=True)]

    def _place(self, value: Value) -> int:
        if value not in self._places:
            self._places[value] = len(self._places)
            if value.constant is not None:
                self._constants.append((self._places[value], value.constant.detach()))
        return self._places[value]

    def evaluate(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The graph's outputs for these inputs."""
        held: list[Tensor | None] = [None] * len(self._places)
        for place, tensor in [*self._constants, *zip(self._inputs, tensors, strict=True)]:
            held[place] = tensor
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            for step in self._steps:
                results = step.run([held[place] for place in step.inputs])  # type: ignore[misc]
                for place, result, dtype in zip(step.outputs, results, step.dtypes, strict=True):
                    held[place] = result if self._autocast else result.to(dtype)
                for place in step.ends:
                    held[place] = None
        return [
            held[place].to(dtype, copy=copies)  # type: ignore[union-attr]
            for place, dtype, copies in self._outputs
        ]

    def report(self, calls: bool = False) -> list[str]:
        """A line that counts the calls by what runs them. calls: a line for each call follows."""
        norms, attentions = self._calls["norm"], self._calls["attention"]
        others = self._calls.total() - norms - attentions - self._calls["view"]
        lines = [f"  {norms} calls of group_norm_silu, {attentions} of attention, {others} of PyTorch"]
        return lines + ([f"{i:4}  {what}" for i, what in enumerate(self._described)] if calls else [])


def _kind(node: Node) -> str:
    return "call" if node.op == "attention" and not _serves_attention(node) else node.op


def _serves_attention(node: Node) -> bool:
    q, k, v = node.reads()
    return q.shape == k.shape == v.shape


def _call_of(node: Node) -> Callable[[list[Tensor]], list[Tensor]]:
    if node.op == "view":
        return partial(_apply, node.options["apply"])
    if node.op == "norm":
        names = [name for name, value in named(node).items() if value is not None]
        activation = "silu" if node.options["silu"] else "none"
        return partial(_normalise, names, node.options["groups"], node.options["eps"], activation)
    if node.op == "attention" and _serves_attention(node):
        return partial(_attend, node.options["scale"])
    return node.options["call"].run


def _apply(apply: Callable[[Tensor], Tensor], tensors: list[Tensor]) -> list[Tensor]:
    return [apply(tensors[0])]


def _normalise(
    names: list[str], groups: int, eps: float, activation: str, tensors: list[Tensor]
) -> list[Tensor]:
    given = dict(zip(names, tensors, strict=True))
    weight, bias, add, scale, shift = (given.get(name) for name in NORM_INPUTS[1:])
    x = given["x"]
    y = group_norm_silu(
        x, groups, weight, bias, eps, activation=activation, add=add, scale=scale, shift=shift
    )
    return [y]


def _attend(scale: float, tensors: list[Tensor]) -> list[Tensor]:
    q, k, v = tensors
    return [attention(q, k, v, scale=scale)]
