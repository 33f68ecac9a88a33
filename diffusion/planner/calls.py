"""Calls of PyTorch's functions: their arguments, their names, and what a name says about the call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .graph import Node, Value


class Slot(NamedTuple):
    """The place of a node's input in the arguments of its call."""

    position: int


@dataclass(frozen=True)
class Call:
    """A call of a function of PyTorch."""

    function: Callable
    name: str
    args: tuple
    options: dict[str, Any]


@dataclass(frozen=True)
class Template:
    """A call with a Slot in the place of each tensor. dtypes: of the tensors, in the order of the slots."""

    function: Callable
    leaves: list[Any]
    structure: Any
    dtypes: list[torch.dtype]

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that the function returns for these, in the order of the node's outputs."""
        leaves = [tensors[leaf.position] if type(leaf) is Slot else leaf for leaf in self.leaves]
        args, options = pytree.tree_unflatten(leaves, self.structure)
        return tensors_in(self.function(*args, **options))


def template_of(call: Call) -> Template:
    leaves, structure = pytree.tree_flatten((call.args, call.options))
    slots: list[Any] = []
    count = 0
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf, count = Slot(count), count + 1
        slots.append(leaf)
    return Template(call.function, slots, structure, [tensor.dtype for tensor in tensors_in(leaves)])


def function_node(
    op: str, function: Callable, inputs: list[Value], output: Value, arguments: tuple = (), **options: Any
) -> Node:
    """A node that can run as function(*inputs, *arguments), on tensors of the output's dtype."""
    slots = tuple(Slot(i) for i in range(len(inputs)))
    leaves, structure = pytree.tree_flatten(((*(None for _ in slots), *arguments), {}))
    dtypes = [output.dtype] * len(slots)
    template = Template(function, [*slots, *leaves[len(slots) :]], structure, dtypes)
    return Node(op, inputs, [output], call=template, **options)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among nested arguments or results, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def name_of(function: Callable) -> str:
    """The function's name without underscores: "add" for `torch.add`, `Tensor.add` and `Tensor.__add__`.

    For reading an attribute of a tensor, such as `mT`, the attribute's name.
    """
    if getattr(function, "__name__", "") == "__get__":
        return getattr(getattr(function, "__self__", None), "__name__", "get")
    return getattr(function, "__name__", type(function).__name__).strip("_") + (
        "_" if _ends_in_place(function) else ""
    )


def _ends_in_place(function: Callable) -> bool:
    name = getattr(function, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def draws(name: str, args: tuple, options: Mapping[str, Any]) -> bool:
    """Whether a call of this name draws random numbers."""
    if "dropout" not in name:
        return name in RANDOM
    return bool(args[2] if len(args) > 2 else options.get("training", True))


def writes_in_place(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a call of this name changes one of its arguments."""
    inplace = options.get("inplace", False) or options.get("out") is not None
    return name.endswith("_") or name in _IN_PLACE or name == "setitem" or bool(inplace)


def updates_statistics(function: Callable, args: tuple, options: Mapping[str, Any]) -> bool:
    """Whether a call updates the running statistics of a batch normalisation."""
    place = {F.batch_norm: 1, torch.batch_norm: 3}.get(function)  # of the running mean
    if place is None:
        return False
    training = args[5] if len(args) > 5 else options.get("training", False)
    mean = args[place] if len(args) > place else options.get("running_mean")
    return bool(training) and mean is not None


_IN_PLACE: dict[str, Callable] = {
    "iadd": torch.add,
    "imul": torch.mul,
    "isub": torch.sub,
    "itruediv": torch.div,
}
_PURE: dict[str, Callable] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "mish": F.mish,
    "leaky_relu": F.leaky_relu,
}
_ELEMENTWISE = {"add", "mul", "sub", "div", "clamp", "sigmoid", "tanh", "exp", "neg", "addcmul"}
_ELEMENTWISE |= {
    "masked_fill",
    "pow",
    "sqrt",
    "rsqrt",
    "square",
    "reciprocal",
    "abs",
    "round",
    "floor",
    "ceil",
    "log",
    "sin",
    "cos",
}


def pure(name: str) -> Callable | None:
    """The function that computes anew what a call of this name writes in place, or None."""
    if name == "setitem":
        return with_item
    if name in _IN_PLACE:
        return _IN_PLACE[name]
    plain = name.removesuffix("_")
    if plain in _ELEMENTWISE:
        return getattr(torch, plain)
    return _PURE.get(plain)


def with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of the tensor in which result[index] is `value`."""
    result = tensor.clone()
    result[index] = value
    return result


RANDOM = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli"}
RANDOM |= {"normal", "multinomial", "poisson", "binomial", "gumbel_softmax"}
