"""The inputs of fused nodes, by name."""

from ..graph import FLOATS, Node, Value

NORM_INPUTS = ("x", "weight", "bias", "add", "scale", "shift")
CHANNEL_NORM_INPUTS = ("x", "weight", "bias", "scale", "shift", "residual")
CONVOLUTION_INPUTS = ("x", "weight", "bias", "affine", "residual")
AVERAGE_INPUTS = ("x", "affine")


def named(node: Node) -> dict[str, Value | None]:
    """The inputs of a fused node by name."""
    return dict(zip(node.options["names"], node.inputs, strict=True))


def other_operand(node: Node, value: Value) -> Value | None:
    """The other operand of a binary node, or None for a number."""
    if len(node.inputs) != 2:
        return None
    return node.inputs[1] if node.inputs[0] is value else node.inputs[0]


def is_fusable(node: Node) -> bool:
    """Whether a convolution or linear map becomes a call of the compiled op: its weights are constants."""
    x, weight = node.inputs[:2]
    assert x is not None
    assert weight is not None
    fits = x.dtype in FLOATS and x.ndim >= 2 and weight.constant is not None and 0 not in x.shape
    constant_bias = len(node.inputs) < 3 or node.inputs[2] is None or node.inputs[2].constant is not None
    return fits and constant_bias and weight.ndim in (2, 4)


def factor_of(node: Node | None) -> float | None:
    """The number that a node multiplies its input by, or None for another node."""
    if node is None or node.op not in ("mul", "div") or node.options["scalar"] is None:
        return None
    number = node.options["scalar"]
    if node.op == "div":
        return 1 / number if number else None
    return float(number)


def first_input(node: Node) -> Value:
    """The first input of a node that always has one."""
    first = node.inputs[0]
    assert first is not None
    return first
