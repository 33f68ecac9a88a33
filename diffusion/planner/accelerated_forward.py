"""The forward of an accelerated module: a plan for each shape of its arguments, or the module itself."""

import functools
import inspect
import threading
from collections import OrderedDict
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
from .planned_call import PlannedCall, failure, plan_call, tensors_of
from .release import ReleasedWeights
from .state import ModuleState
from .trace import Untraceable
from .unfit_calls import unfit_inputs, unfit_module
from .weights import Weights

MAX_PLANS = 8  # of a thread, each for inputs of one shape
MAX_REASONS = 64  # against plans of other shapes or numbers
MAX_CHANGES = 4  # of the module before as many calls in a row; it is not planned until a call without one
_CPU = torch.device("cpu")


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
            numbers = [self._numbers_vary and type(leaf) in (int, float) for leaf in leaves]
            given = [
                torch.tensor(leaf, device=device) if is_number else leaf
                for leaf, is_number in zip(leaves, numbers, strict=True)
            ]
            planned, first = self._planned(given, numbers, structure, device, plain)
            if planned is None and any(numbers):
                given = leaves  # the network needs the numbers themselves
                planned, first = self._planned(given, [False] * len(leaves), structure, device, plain)
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
        structure: Any,
        device: torch.device,
        plain: Callable[[], Any],
    ) -> tuple[PlannedCall | None, list[Any]]:
        """The plan for a call, or None with the reason in `_last`; and in a list what a new plan returned.

        numbers: the leaves that stand for one. plain: the call of the module itself, with which a new plan is
        compared.
        """
        key = (structure, tuple(map(_key_of, leaves)), tuple(numbers), _native.simd_in_use())
        with self._lock:
            known = key in vars(self._thread_local).get("plans", ()) or key in self._reasons
        if not known:
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
        plans: OrderedDict[tuple, PlannedCall] = vars(thread_local).setdefault("plans", OrderedDict())
        first: list[Any] = []
        if key not in plans:
            if len(plans) >= MAX_PLANS:
                plans.popitem(last=False)
                vars(thread_local).pop("pool", None)  # frees the memory that only the plan holds
            try:
                make = functools.partial(self._made, device=device)
                made = plan_call(self._module, leaves, numbers, structure, device, state, make)
                try:
                    first = [made.evaluate(tensors_of(leaves))]
                except Exception as error:
                    raise Untraceable(failure(error)) from error
                wrong = difference(plain(), first[0], narrow=self._is_narrow())
                if wrong is not None:
                    raise Untraceable(f"a plan gives another result, {wrong}")
            except Untraceable as error:
                self._reasons[key] = self._last = str(error)
                while len(self._reasons) > MAX_REASONS:
                    self._reasons.popitem(last=False)
                return None, []
            if self._released is not None:
                self._released.leave_memory()
            plans[key] = made
        plans.move_to_end(key)
        self._last = ""
        vars(thread_local)["last"] = plans[key]
        return plans[key], first

    def _made(self, graph: Graph, dtype: torch.dtype, device: torch.device) -> Plan | EagerPlan:
        if device.type != "cpu":
            return EagerPlan(graph, device, autocast=self.precision == "fast")
        if self._weights is None or self._weights.simd != _native.simd_in_use():
            narrow = self.precision == "fast" and dtype == torch.float32 and multiplies_bfloat16(device)
            maps = torch.bfloat16 if narrow else dtype
            self._weights = Weights(list(self._module.parameters()), maps)
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


def _key_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)
