"""The forward of an accelerated module: a plan for each shape of its arguments, or the module itself."""

import functools
import inspect
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..kernels import _native
from ..utils.device import multiplies_bfloat16
from .buffers import Pool
from .comparison import difference
from .eager_plan import EagerPlan
from .graph import Graph
from .plan import Plan
from .planned_call import PlannedCall, failure, plan_call, tensors_of, with_repeats
from .release import ReleasedWeights
from .state import ModuleState
from .trace import Untraceable
from .unfit_calls import unfit_inputs, unfit_module
from .weights import Weights

MAX_PLANS = 8  # of a thread, each for inputs of one shape
MAX_REASONS = 64  # against plans of other shapes or numbers
MAX_CHANGES = 4  # of the module before as many calls in a row; it is not planned until a call without one
CALLS_OF_PLAN = 16  # of a thread, at least, from one new plan to another for a shape that has had one
_CPU = torch.device("cpu")
_NUMBERS = {int: torch.int64, float: torch.float64}  # the dtypes in which Python computes


class AcceleratedForward:
    """Takes the place of a module's `forward`.

    numbers_vary: one plan serves all values of a number among the arguments, such as a timestep; else each
    value has its own. released: the module's weights, where they are in a file.
    """

    def __init__(
        self,
        module: nn.Module,
        precision: str,
        numbers_vary: bool = True,
        released: ReleasedWeights | None = None,
    ):
        self._module, self.precision, self._numbers_vary = module, precision, numbers_vary
        self._lock, self._released = threading.Lock(), released
        self._changes = 0  # of the module, before as many of the last calls
        self._forget()
        functools.update_wrapper(self, type(module).forward, updated=())
        self.__signature__ = inspect.signature(module.forward)

    def _forget(self) -> None:
        self._state: ModuleState | None = None
        self._weights: Weights | None = None
        self._thread_local = threading.local()
        self._reasons: OrderedDict[tuple, str] = OrderedDict()  # against a plan, by the key of the call
        self._last = "it has not been called"

    def __reduce__(self) -> tuple[Callable, tuple]:
        return AcceleratedForward, (self._module, self.precision, self._numbers_vary)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = next((p.device for p in self._module.parameters()), _CPU)
        reason = unfit_module(self._module, device)
        if reason is None:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            reason = unfit_inputs(self._module, leaves, device)
        if reason is not None:
            self._last = reason
            return type(self._module).forward(self._module, *args, **kwargs)
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

        @functools.cache
        def plain() -> Any:
            with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
                return type(self._module).forward(self._module, *args, **kwargs)

        with torch.inference_mode(False), torch.no_grad():
            leaves = with_repeats(leaves)
            numbers = [self._numbers_vary and _fits(leaf) for leaf in leaves]
            given = [
                torch.tensor(leaf, dtype=_NUMBERS[type(leaf)], device=device) if is_number else leaf
                for leaf, is_number in zip(leaves, numbers, strict=True)
            ]
            values = tuple(leaf for leaf, is_number in zip(leaves, numbers, strict=True) if is_number)
            planned, first = self._planned(given, numbers, values, structure, device, plain)
            if planned is None and values:
                given = leaves  # the network needs the numbers themselves
                planned, first = self._planned(given, [False] * len(leaves), (), structure, device, plain)
            if planned is not None and not (gradients and self._wants_gradient(planned)):
                return first[0] if first else planned.evaluate(tensors_of(given))
        return plain()

    def _wants_gradient(self, planned: PlannedCall) -> bool:
        wanted = any(tensor.requires_grad for tensor in planned.constants)
        if wanted:
            self._last = "a gradient is wanted of a tensor that is no parameter of it"
        return wanted

    def _is_narrow(self) -> bool:
        """Whether plans may compute in 16 bits."""
        floats = [p.dtype for p in self._module.parameters() if p.is_floating_point()]
        return self.precision == "fast" or any(dtype.itemsize < 4 for dtype in floats)

    def _planned(
        self,
        leaves: list[Any],
        numbers: list[bool],
        values: tuple[float, ...],
        structure: Any,
        device: torch.device,
        plain: Callable[[], Any],
    ) -> tuple[PlannedCall | None, list[Any]]:
        """The plan for a call, or None with the reason in `_last`; and in a list what it returned, if it ran.

        numbers: the leaves that stand for one. values: these numbers. plain: the call of the module itself,
        with which a plan is compared when it is new, and once more when it first has other numbers.
        """
        key = (structure, tuple(map(_key_of, leaves)), tuple(numbers), _native.simd_in_use())
        literal = None if values else _without_numbers(structure, leaves)
        with self._lock:
            of_thread = vars(self._thread_local)
            known = key in of_thread.get("plans", ()) or key in self._reasons
            known = known or _postponed(of_thread, key, literal) is not None
        if not known:
            self._last = "the call of the module itself has failed"
            plain()  # before a plan takes memory, and before the module's state is noted
        with self._lock:
            # Another plan packs weights anew, so that all must still be those of the plans before.
            state = self._state
            holds = state is not None and state.holds(whole=not known)
            self._changes = 0 if holds or state is None else self._changes + 1
            if state is None or not holds:
                self._forget()
                try:
                    state = self._state = ModuleState(self._module, compares_numbers=self._released is None)
                except Exception as error:
                    self._last = f"its attributes cannot be followed, {failure(error)}"
                    return None, []
            if self._changes >= MAX_CHANGES:
                self._last = f"it has changed before each of the last {self._changes} calls"
                return None, []
            thread_local, hooked = self._thread_local, state.hooked()
        if hooked is not None:
            self._last = f"a module within it, {hooked}, has a forward hook"
            return None, []
        if key in self._reasons:
            self._last = self._reasons[key]
            return None, []
        of_thread = vars(thread_local)
        plans: OrderedDict[tuple, PlannedCall] = of_thread.setdefault("plans", OrderedDict())
        # The numbers with which a plan was compared when it was new.
        compared: dict[tuple, tuple[float, ...]] = of_thread.setdefault("compared", {})
        of_thread["calls"] = of_thread.get("calls", 0) + 1  # since the last new plan
        first: list[Any] = []
        try:
            if key not in plans:
                postponed = _postponed(of_thread, key, literal)
                if postponed is not None:
                    self._last = postponed
                    return None, []
                _make_room(of_thread, literal)
                make = functools.partial(self._made, device=device)
                arguments = leaves, numbers, structure, device, state, make
                plan = functools.partial(plan_call, self._module, *arguments)
                made, result = _first_result(plan, tensors_of(leaves), device)
                self._compare(result, plain())
                if self._released is not None:
                    self._released.leave_memory()
                plans[key], compared[key], first = made, values, [result]
            elif compared.get(key, values) != values and not _captures(device):
                first = [plans[key].evaluate(tensors_of(leaves))]
                self._compare(first[0], plain())
                del compared[key]
        except Untraceable as error:
            plans.pop(key, None)
            compared.pop(key, None)
            self._reasons[key] = self._last = str(error)
            while len(self._reasons) > MAX_REASONS:
                self._reasons.popitem(last=False)
            return None, []
        plans.move_to_end(key)
        self._last = ""
        of_thread["last"] = plans[key]
        return plans[key], first

    def _compare(self, result: Any, expected: Any) -> None:
        """Untraceable: the result of a plan is not the module's."""
        wrong = difference(expected, result, narrow=self._is_narrow())
        if wrong is not None:
            raise Untraceable(f"a plan gives another result, {wrong}")

    def _made(self, graph: Graph, dtype: torch.dtype, device: torch.device) -> Plan | EagerPlan:
        if device.type != "cpu":
            return EagerPlan(graph, device, autocast=self.precision == "fast")
        if self._weights is None or self._weights.simd != _native.simd_in_use():
            narrow = self.precision == "fast" and dtype == torch.float32 and multiplies_bfloat16(device)
            maps = torch.bfloat16 if narrow else dtype
            self._weights = Weights(list(self._module.parameters()), maps)
        if self._weights.dtype == torch.float32 and graph.rounds_to_16_bits():
            raise Untraceable("it rounds feature maps to 16 bits")
        pool = vars(self._thread_local).setdefault("pool", Pool())  # the thread runs one plan at a time
        return Plan(graph, self._weights, pool)

    def report(self, calls: bool = False) -> str:
        """The plan of this thread's last call, with what is fused in it, or the reason against a plan.

        calls: a line for each call of the plan follows, with sizes, FLOPs and bytes.
        """
        planned: PlannedCall | None = getattr(self._thread_local, "last", None)
        if self._last or planned is None:
            return f"{type(self._module).__name__}: as its modules\n  not planned: {self._last}"
        lines = [f"{type(self._module).__name__}: planned, {self.precision}", *planned.plan.report(calls)]
        return "\n".join(lines)


def _without_numbers(structure: Any, leaves: list[Any]) -> tuple | None:
    """The key of a call without the values of its numbers, or None for a call without numbers."""
    if not any(type(leaf) in _NUMBERS for leaf in leaves):
        return None
    return structure, tuple(type(leaf) if type(leaf) in _NUMBERS else _key_of(leaf) for leaf in leaves)


def _postponed(of_thread: dict[str, Any], key: tuple, literal: tuple | None) -> str | None:
    """The reason why a call that has no plan gets none now.

    A plan costs about as much as CALLS_OF_PLAN / 2 calls, which plans that take turns would not earn back.
    literal: of a network that needs the numbers among its arguments, its key without them.
    """
    if literal is not None and of_thread.get("literals", {}).get(literal, 0) >= MAX_PLANS:
        return f"it reads numbers among its arguments, and {MAX_PLANS} values of these have had plans"
    if key in of_thread.get("dropped", ()) and of_thread["calls"] < CALLS_OF_PLAN:
        return f"arguments of more than {MAX_PLANS} shapes take turns"
    return None


def _make_room(of_thread: dict[str, Any], literal: tuple | None) -> None:
    """Counts a new plan of a thread, and drops the one that was used least recently, if there are many."""
    if literal is not None:
        of_thread.setdefault("literals", Counter())[literal] += 1
    dropped: OrderedDict[tuple, None] = of_thread.setdefault("dropped", OrderedDict())
    if len(of_thread["plans"]) >= MAX_PLANS:
        last, _ = of_thread["plans"].popitem(last=False)
        of_thread["compared"].pop(last, None)
        of_thread.pop("pool", None)  # frees the memory that only the plan holds
        dropped[last] = None
        while len(dropped) > MAX_REASONS:
            dropped.popitem(last=False)
    of_thread["calls"] = 0


def _first_result(
    plan: Callable[[], PlannedCall], tensors: list[Tensor], device: torch.device
) -> tuple[PlannedCall, Any]:
    """A new plan and what it returns for these tensors. Untraceable: it draws random numbers, or fails."""
    before = _random_states(device)
    planned = plan()
    try:
        result = planned.evaluate(tensors)
    except Exception as error:
        raise Untraceable(failure(error)) from error
    if not all(map(torch.equal, before, _random_states(device))):
        torch.set_rng_state(before[0])
        if len(before) > 1:
            torch.cuda.set_rng_state(before[1], device)
        raise Untraceable("it draws random numbers")
    return planned, result


def _random_states(device: torch.device) -> list[Tensor]:
    """The states of PyTorch's generators of random numbers, on the CPU and on the device."""
    on_gpu = device.type == "cuda" and torch.cuda.is_initialized()
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]


def _captures(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _fits(leaf: Any) -> bool:
    """Whether a leaf is a number that a tensor can hold in its place."""
    return type(leaf) is float or (type(leaf) is int and abs(leaf) < 2**31)


def _key_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype
    return type(leaf), leaf.hex() if isinstance(leaf, float) else leaf  # -0.0 == 0.0
