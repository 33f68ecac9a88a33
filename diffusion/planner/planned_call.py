"""A planned call: the plan of one module for arguments of one shape, made from a trace of it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..utils.errors import first_line
from .eager_plan import EagerPlan
from .graph import FLOATS, Graph, Value
from .plan import Plan
from .state import ModuleState
from .trace import Untraceable, WrittenData, are_kept, trace


@dataclass(frozen=True)
class Repeat:
    """Stands for a tensor among the leaves of a call's arguments that is also an earlier one."""

    of: int


def with_repeats(leaves: list[Any]) -> list[Any]:
    """The leaves, with a Repeat in the place of a tensor that came before."""
    first: dict[int, int] = {}
    found = []
    for i, leaf in enumerate(leaves):
        earlier = first.setdefault(id(leaf), i) if isinstance(leaf, Tensor) else i
        found.append(leaf if earlier == i else Repeat(earlier))
    return found


class PlannedCall(NamedTuple):
    """A plan, and how its outputs become what the module returns."""

    plan: Plan | EagerPlan
    leaves: list[Any]  # a Value for each tensor
    structure: Any
    constants: list[Tensor]  # on which it depends

    def evaluate(self, tensors: list[Tensor]) -> Any:
        """What the module returns for these tensors among its arguments."""
        outputs = iter(self.plan.evaluate(tensors))
        results = [next(outputs) if isinstance(leaf, Value) else leaf for leaf in self.leaves]
        return pytree.tree_unflatten(results, self.structure)


def plan_call(
    module: nn.Module,
    leaves: list[Any],
    numbers: list[bool],
    structure: Any,
    device: torch.device,
    state: ModuleState,
    make: Callable[[Graph, torch.dtype], Plan | EagerPlan],
) -> PlannedCall:
    """Traces a call of the module and plans it.

    leaves, structure: the arguments, flattened by pytree. numbers: the leaves that stand for a number. state:
    of the module, which then watches the tensors that the plan depends on. make: a plan of a graph, and of
    the dtype of the module's weights.
    Untraceable: with the reason against a plan.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode  # takes 0.5 s

    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    dtype = _plan_dtype(list(named.values()), device)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        given = {
            f"argument {i}": torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor)
        }

    def run(**arguments: Tensor) -> Any:
        values = iter(arguments.values())
        filled = [next(values) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        filled = [filled[leaf.of] if isinstance(leaf, Repeat) else leaf for leaf in filled]
        args, kwargs = pytree.tree_unflatten(filled, structure)
        result = type(module).forward(module, *args, **kwargs)
        left, same = pytree.tree_flatten((args, kwargs))
        if same != structure or any(a is not b for a, b in zip(left, filled, strict=True)):
            raise Untraceable("it changes a list or dictionary among its arguments")
        return result

    try:
        held = {name: (tensor, tensor) for name, tensor in named.items()}
        try:
            graph, result = _traced(run, given, held, state)
        except WrittenData:
            with fake:
                graph, result = _traced(run, given, held, state)
        arguments = list(given.values())
        given.clear()
        if are_kept(arguments):
            raise Untraceable("it keeps an argument")
        tensors = (number for number, leaf in zip(numbers, leaves, strict=True) if isinstance(leaf, Tensor))
        if _returns_a_number(graph, list(tensors)):
            raise Untraceable("it returns a number that it computes from numbers alone")
        constants = graph.constants()
        state.watch(constants)
        plan = make(graph, dtype)
    except Untraceable:
        raise
    except DataDependentOutputException as error:
        raise Untraceable(f"it reads the values of tensors, by {error.func}") from error
    except Exception as error:
        raise Untraceable(failure(error)) from error
    results, shape = pytree.tree_flatten(result)
    return PlannedCall(plan, results, shape, constants)


def _traced(
    run: Callable[..., Any],
    given: dict[str, Tensor],
    held: dict[str, tuple[Tensor, Tensor]],
    state: ModuleState,
) -> tuple[Graph, Any]:
    try:
        traced = trace(run, given, held)
    finally:
        altered = state.put_back()
    if altered:
        raise Untraceable("it changes its attributes as it runs")
    return traced


def failure(error: Exception) -> str:
    """The first line of an error's message, behind its type."""
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def tensors_of(leaves: list[Any]) -> list[Tensor]:
    """The tensors among the leaves of a call's arguments."""
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _returns_a_number(graph: Graph, numbers: list[bool]) -> bool:
    """Whether an output depends on numbers alone. numbers: for each input of the graph, whether it is one."""
    alone = {value for value, is_number in zip(graph.inputs, numbers, strict=True) if is_number}
    for node in graph.nodes:
        if node.inputs and alone.issuperset(node.reads()):
            alone.update(node.outputs)
    return not alone.isdisjoint(graph.outputs)


def _plan_dtype(tensors: list[Tensor], device: torch.device) -> torch.dtype:
    found = {t.dtype for t in tensors if t.dtype.is_floating_point and isinstance(t, nn.Parameter)}
    unknown = found - set(FLOATS)
    if not found or unknown or any(t.device != device for t in tensors):
        kinds = sorted({f"{t.dtype} on {t.device}" for t in tensors if isinstance(t, nn.Parameter)})
        raise Untraceable(f"its weights are {', '.join(kinds)}" if kinds else "it has no parameters")
    return functools.reduce(torch.promote_types, found)
