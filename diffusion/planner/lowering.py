"""Names the operation of each function of PyTorch that the planner knows, and keeps the call of all others.

Every node keeps its call, by which it runs where nothing is fused. A node's op says more:

view        the first input in another shape, order or range, without a computation: apply, a function
conv        a convolution of maps, square and without groups or dilation: stride, padding
conv1d      a convolution of sequences [N, C, S] by a kernel of one
linear      a linear map of the last dimension
product     an Einstein sum of two tensors: equation, and the number that it is multiplied by, scale
softmax     dim
group_norm  groups, eps
layer_norm  of the last dimension: eps; rms, whether the mean is taken to be 0
normalize   divided by the length of its vectors, at least eps: dim, eps
mean, variance, length    of vectors: dims, keepdim
power       exponent
at_least    the larger of the number `least` and the input
silu, gelu  gelu: approximate, "none" or "tanh"
add, mul, sub, div    of two values, or of one value and the number `scalar`
cat         of maps along their channels
join        of other tensors, of three dimensions at least: dim
attention   scaled dot products of q, k and v without a mask: scale
double      nearest-neighbour interpolation to twice the height and width
average     of squares of 2 x 2 pixels
pad         zeros to the right and below: pads
call        any other function
"""

from typing import Any

import torch

from .calls import Call, function_node, template_of
from .graph import FLOATS, Node, Value
from .known_functions import KNOWN
from .view_functions import Pick, Reshape, itself


def lower(call: Call, inputs: list[Value], outputs: list[Value], single: bool) -> list[Node]:
    """The nodes of a call. inputs, outputs: its tensors, in order. single: it returns one tensor."""
    if single and len(inputs) == 1 and _changes_nothing(call) and inputs[0].dtype == outputs[0].dtype:
        return [Node("view", inputs, outputs, apply=itself)]
    if call.name in _VIEWS and inputs:
        nodes = _views(call, inputs, outputs)
        if nodes is not None:
            return nodes
    if call.name == "addcmul":
        nodes = _addcmul(call, inputs, outputs)
        if nodes is not None:
            return nodes
    op: str = "call"
    options: dict[str, Any] = {}
    known = KNOWN.get(call.name) if single else None
    if known is not None:
        try:
            found = known(*call.args, **call.options)
        except Exception:  # other arguments than the planner knows
            found = None
        if found is not None:
            op, options = found
    return [Node(op, inputs, outputs, call=template_of(call), **options)]


# ---- Views.

_SHAPING = {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}  # the output's shape says all
_SAME = {"contiguous", "clone", "detach", "alias"}
_RANGES = {"split", "chunk", "unbind", "tensor_split"}
_ORDERS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "select", "narrow"}
_ORDERS |= {"T", "mT"}
_ORDERS |= {"squeeze", "unsqueeze", "expand", "getitem"}
_CASTS = {"to", "type", "float", "half", "bfloat16", "type_as"}
_VIEWS = _SHAPING | _SAME | _RANGES | _ORDERS | _CASTS | {"dropout"}


def _views(call: Call, inputs: list[Value], outputs: list[Value]) -> list[Node] | None:
    source, name = inputs[0], call.name
    if name in _SAME or name == "dropout":
        return [Node("view", [source], outputs, apply=itself)]
    if name in _CASTS:
        floats = source.dtype in FLOATS and outputs[0].dtype in FLOATS and source.ndim > 2
        return [Node("view", [source], outputs, apply=itself)] if floats else None
    if name in _SHAPING and source.dtype != outputs[0].dtype:  # the same memory as other numbers
        return None
    if name in _SHAPING:
        return [Node("view", [source], outputs, apply=Reshape(outputs[0].shape))]
    if len(inputs) > 1:  # an index by tensors
        return None
    template = template_of(call)
    return [Node("view", [source], [value], apply=Pick(template, i)) for i, value in enumerate(outputs)]


def _addcmul(call: Call, inputs: list[Value], outputs: list[Value]) -> list[Node] | None:
    """A product and a sum, for input + tensor1 * tensor2."""
    if call.options or len(call.args) != 3 or len(inputs) != 3:
        return None
    shape = torch.broadcast_shapes(inputs[1].shape, inputs[2].shape)
    product = Value(torch.empty(shape, dtype=outputs[0].dtype, device="meta"))
    return [
        function_node("mul", torch.mul, inputs[1:], product, scalar=None),
        function_node("add", torch.add, [product, inputs[0]], outputs[0], scalar=None),
    ]


def _changes_nothing(call: Call) -> bool:
    """Whether the call multiplies or divides by one, or rearranges pixels by a factor of one."""
    by_one = call.name in ("pixel_shuffle", "pixel_unshuffle", "mul", "rmul", "div", "truediv")
    numbers = [value for value in (*call.args, *call.options.values()) if not isinstance(value, torch.Tensor)]
    return by_one and [type(number) for number in numbers] in ([int], [float]) and numbers[0] == 1
