"""Traces a network: runs it once, without data, and records the functions of PyTorch that it calls.

What the network computes from its own tensors alone has data, so that a cache in which it keeps such results
holds what it would without a trace. Within a FakeTensorMode nothing has data.
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import calls
from .graph import Graph, Node, Value, shares_memory
from .known_functions import in_order
from .lowering import lower
from .shapes import empty_result


class Untraceable(Exception):
    """The reason why a network cannot be planned, as a clause."""


class WrittenData(Exception):
    """A tensor with data was to be overwritten by one without; the trace needs a FakeTensorMode."""


class Tracer(TorchFunctionMode):
    """Records the calls of PyTorch's functions on tensors of a graph as its nodes.

    constants: for each tensor that the network holds, by name: as it sees it, and as it is.
    """

    def __init__(self, constants: Mapping[str, tuple[Tensor, Tensor]]):
        super().__init__()
        self.nodes: list[Node] = []
        self._autocasts = _autocasts()
        self.read: list[Value] = []  # constants whose numbers the network's own code may have read
        self._noted: set[Value] = set()  # these, and what was computed from them
        self._values: dict[int, Value] = {}
        self._held: list[Tensor] = []  # a tensor that was freed could give its id to another one
        for name, (seen, tensor) in constants.items():
            self.add(seen, Value(seen, name, constant=tensor))

    def add(self, tensor: Tensor, value: Value) -> Value:
        self._values[id(tensor)] = value
        self._held.append(tensor)
        return value

    def value(self, tensor: Tensor) -> Value:
        """The value of a tensor; one that the graph has not computed is a constant of the network."""
        found = self._values.get(id(tensor))
        if found is None:
            if not _has_data(tensor):
                raise Untraceable("it computes a tensor by other means than PyTorch's functions")
            found = self.add(tensor, Value(tensor, "a tensor of the network", constant=tensor))
        return found

    def __torch_function__(
        self,
        function: Callable,
        types: Iterable[type],
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = calls.name_of(function)
        options = in_order(name, kwargs or {})
        before = calls.tensors_in((args, options))
        if _autocasts() != self._autocasts:
            raise Untraceable("it enables autocast as it runs")
        versions = list(map(_version, before))
        written = calls.writes_in_place(name, options) or calls.updates_statistics(function, args, options)
        # Both are decided before the call, since it could change a tensor of the network, or draw numbers.
        pure = self._pure_of_write(name, args, options) if written else None
        if not written and calls.draws(name, args, options):
            raise Untraceable(f"it draws random numbers, by {name}")
        result = empty_result(function, args, options)
        if result is None:
            result = function(*args, **options)
        results = calls.tensors_in(result)
        if name in ("set", "as_strided"):  # memory is laid out in another way here
            raise Untraceable(f"it looks at the memory of tensors, by {name}")
        if versions != list(map(_version, before)) and not written:
            raise Untraceable(f"it writes in place, by {name}")
        if pure is not None:
            self._write(name, pure, args, options, result)
        elif not results:
            self._note_read(before)
        else:
            known = [tensor for tensor in results if any(tensor is other for other in before)]
            if len(known) < len(results):  # x.to(its own dtype) is x
                inputs = [self.value(tensor) for tensor in before]
                outputs = [self.add(tensor, Value(tensor)) for tensor in results]
                call = calls.Call(function, name, args, options)
                self.nodes += lower(call, inputs, outputs, isinstance(result, Tensor))
        return result

    def _pure_of_write(self, name: str, args: tuple, options: dict[str, Any]) -> Callable:
        """The function that computes anew what a call writes into its first argument.

        Untraceable: something else shares that tensor's memory, or there is no such function.
        """
        target, function = args[0] if args else None, calls.pure(name)
        if not isinstance(target, Tensor) or "out" in options or function is None:
            raise Untraceable(f"it writes in place, by {name}")
        old = self.value(target)
        shared = sum(shares_memory(tensor, target) for tensor in self._held)
        if old.node is None or old.node.op == "view" or shared > 1:
            raise Untraceable(f"it changes a tensor that something else shares, by {name}")
        if _has_data(target) and not all(map(_has_data, calls.tensors_in((args, options)))):
            raise WrittenData
        return function

    def _write(self, name: str, pure: Callable, args: tuple, options: dict[str, Any], result: Any) -> None:
        """A call that changed its first argument: the tensor stands for another value from now on."""
        target = args[0]
        if result is not target and name != "setitem":
            raise Untraceable(f"it writes in place, by {name}")
        options.pop("inplace", None)
        inputs = [self.value(tensor) for tensor in calls.tensors_in((args, options))]
        call = calls.Call(pure, calls.name_of(pure), args, options)
        new = Value(target)
        self.nodes += lower(call, inputs, [new], True)
        self._values[id(target)] = new

    def finish(self) -> bool:
        """Ends the trace; returns whether the network keeps a tensor without data that it has computed."""
        computed = [
            tensor
            for tensor in self._held
            if not _has_data(tensor) and self._values[id(tensor)].node is not None
        ]
        self._held.clear()
        self._values.clear()
        return are_kept(computed)

    def _note_read(self, tensors: Iterable[Tensor]) -> None:
        """Notes the constants on which those of these tensors that have data depend."""
        pending = [self.value(tensor) for tensor in tensors if _has_data(tensor)]
        while pending:
            value = pending.pop()
            if value in self._noted:
                continue
            self._noted.add(value)
            if value.constant is not None:
                self.read.append(value)
            elif value.node is not None:
                pending += value.node.reads()


def are_kept(tensors: list[Tensor]) -> bool:
    """Whether something else refers to one of these tensors; empties the list."""
    references = list(map(weakref.ref, tensors))
    tensors.clear()
    if any(refers() is not None for refers in references):
        gc.collect()
    return any(refers() is not None for refers in references)


def _autocasts() -> tuple[bool, bool]:
    """Whether autocast is enabled on the CPU and on a GPU."""
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")


def _has_data(tensor: Tensor) -> bool:
    return not (isinstance(tensor, torch._subclasses.FakeTensor) or tensor.is_meta)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def trace(
    network: Callable[..., Any],
    arguments: Mapping[str, Tensor],
    constants: Mapping[str, tuple[Tensor, Tensor]],
) -> tuple[Graph, Any]:
    """The graph of `network(**arguments)`, and what it returns, with a Value in the place of each tensor.

    arguments: tensors without data (on the meta device, or fake). constants: the network's parameters and
    buffers by name, each as the network sees it, perhaps without data, and as it is. Untraceable: the
    network reads the values of tensors, writes where others read, draws random numbers, or returns objects
    that PyTorch's pytree does not open. WrittenData: trace again within a FakeTensorMode.
    """
    tracer = Tracer(constants)
    inputs = [tracer.add(tensor, Value(tensor, name)) for name, tensor in arguments.items()]
    with torch.no_grad(), tracer:
        result = network(**arguments)
    graph, returned = _graph_of(tracer, inputs, result)
    del result
    if tracer.finish():
        raise Untraceable("it keeps a tensor that it computes")
    return graph, returned


def _graph_of(tracer: Tracer, inputs: list[Value], result: Any) -> tuple[Graph, Any]:
    leaves, structure = pytree.tree_flatten(result)
    for leaf in leaves:
        if not isinstance(leaf, Tensor | int | float | str | torch.dtype | None):
            raise Untraceable(f"it returns a {type(leaf).__name__}")
    outputs = [tracer.value(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    graph = Graph(tracer.nodes, inputs, [value for value in outputs if isinstance(value, Value)])
    graph.read = tracer.read
    graph.drop_unused()
    return graph, pytree.tree_unflatten(outputs, structure)
