"""Describes a plan: its calls, what is fused in them, their FLOPs, and the memory that it takes."""

from collections import Counter
from collections.abc import Callable

import torch

from ..kernels.ops.attention.library import attention_
from ..kernels.ops.linear_attention.library import linear_attention_
from .fusion import named
from .graph import Node, Value
from .layout import Layout


def summary(layout: Layout, packed_bytes: int) -> list[str]:
    """Lines that say what is fused, what is not, the FLOPs of an evaluation, and the memory of the plan.

    packed_bytes: of the weights that all plans of the network share.
    """
    nodes = layout.graph.nodes
    convolutions = [named(node) for node in nodes if node.op == "convolution"]
    normed = sum(inputs["affine"] is not None for inputs in convolutions)
    added = sum(inputs["residual"] is not None for inputs in convolutions)
    activated = sum(node.options["activation"] != "none" for node in nodes if node.op == "convolution")
    attentions = sum(function in (attention_, linear_attention_) for function, _ in layout.calls)
    buffers = layout.placement.pool.bytes + sum(tensor.nbytes for tensor in layout.inputs)
    total = sum(map(flops, nodes))
    rest = Counter(map(_described, layout.unfused))
    unfused = sum(map(flops, layout.unfused))
    return [
        f"  {len(layout.calls)} calls, {total / 1e9:.2f} GFLOP, {buffers / 1e6:.1f} MB of buffers, "
        f"{packed_bytes / 1e6:.1f} MB of packed weights",
        f"  {len(convolutions)} convolutions and linear maps, {normed} with the norm before them, "
        f"{activated} with an activation and {added} with a sum after them; {attentions} attentions",
        *([f"  {unfused / total:.1%} of the FLOPs in calls of PyTorch"] if unfused else []),
        *(f"  not fused: {count} x {what}" for what, count in rest.most_common()),
    ]


def table(layout: Layout) -> list[str]:
    """A line for each call, in order: its function, sizes, what is fused in it, MFLOP and KB written."""
    lines = []
    seen: set[Node] = set()
    for i, ((function, _), node) in enumerate(zip(layout.calls, layout.origins, strict=True)):
        name = getattr(function, "__name__", str(function))
        if node is None:
            lines.append(f"{i:4}  {name}")
            continue
        work, written = (0.0, 0.0) if node in seen else (flops(node) / 1e6, _written(node, layout) / 1e3)
        seen.add(node)
        sizes = f"{_sizes(next(node.reads(), None))} -> {_sizes(node.outputs[0])}"
        lines.append(f"{i:4}  {name:20} {sizes:40} {work:10.1f} MFLOP {written:9.1f} KB  {_fused(node)}")
    return lines


def flops(node: Node) -> float:
    """Multiplications and additions of a node's products; those of norms and activations do not count."""
    if node.op == "convolution":
        weight, out = named(node)["weight"], node.output
        assert weight is not None
        channels = out.shape[-1] if node.options["writes_rows"] else out.shape[1]
        return 2 * out.shape.numel() / max(channels, 1) * weight.shape.numel()
    if node.op == "linear_attention":
        q, _, v, *_ = (value.shape for value in node.reads())
        return 4 * q.numel() * v[2]
    if node.op in ("view", "norm", "affine", "channel_norm", "cat", "double", "average", "squares"):
        return 0
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton

    inputs = [torch.empty(value.shape, dtype=value.dtype, device="meta") for value in node.reads()]
    with FlopCounterMode(display=False) as counter:
        try:
            node.options["call"].run(inputs)
        except (RuntimeError, NotImplementedError):  # it has no form without data
            return 0
    return counter.get_total_flops()


def _written(node: Node, layout: Layout) -> float:
    """Bytes of a node's outputs in the plan."""
    return sum(value.shape.numel() * layout.placement.dtype(value).itemsize for value in node.outputs)


def _sizes(value: Value | None) -> str:
    return "" if value is None else "x".join(map(str, value.shape)) or "1"


def _fused(node: Node) -> str:
    """The names of what a node has taken in."""
    if node.op != "convolution":
        return "" if node.op != "call" else _name(node.options["call"].function)
    inputs, options = named(node), node.options
    parts = [f"{options['kernel']}x{options['kernel']}"]
    norm = inputs["affine"]
    if norm is not None and norm.node is not None:
        parts.append("norm, SiLU before" if norm.node.options["silu"] else "norm before")
    parts += ["doubled"] if options["scale"] == 2 else []
    parts += [f"stride {options['stride']}"] if options["stride"] != 1 else []
    parts += [options["activation"]] if options["activation"] != "none" else []
    parts += ["sum"] if inputs["residual"] is not None else []
    parts += [f"times {options['factor']:.4g}"] if options["factor"] != 1 else []
    return "; ".join(parts)


def _described(node: Node) -> str:
    """The function of PyTorch that a node calls, the size of its output, and the planner's fault, if any."""
    called = f"{_name(node.options['call'].function)} {list(node.outputs[0].shape)}"
    return f"{called}: {node.options['reason']}" if "reason" in node.options else called


def _name(function: Callable) -> str:
    return getattr(function, "__name__", str(function))
