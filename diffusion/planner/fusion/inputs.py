"""The inputs of fused nodes, by name."""

from ..graph import Node, Value

NORM_INPUTS = ("x", "weight", "bias", "add", "scale", "shift")
CONVOLUTION_INPUTS = ("x", "weight", "bias", "affine", "residual")


def named(node: Node) -> dict[str, Value | None]:
    """The inputs of a fused node by name."""
    return dict(zip(node.options["names"], node.inputs, strict=True))


def other_operand(node: Node, value: Value) -> Value | None:
    """The other operand of a binary node, or None for a number."""
    if len(node.inputs) != 2:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]
