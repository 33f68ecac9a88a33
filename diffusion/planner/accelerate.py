"""accelerate: any network of PyTorch, planned at its first call with inputs of a shape."""

import copyreg
import functools
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree

from ..kernels import _native
from ..kernels._dispatch import intercepted, transformed
from ..utils.device import multiplies_bfloat16
from ..utils.errors import first_line
from .buffers import Pool
from .comparison import difference
from .eager_plan import EagerPlan
from .graph import FLOATS, Graph, Value
from .plan import Plan
from .release import ReleasedWeights
from .state import ModuleState
from .trace import Untraceable, WrittenData, are_kept, trace
from .weights import Weights

M = TypeVar("M", bound=nn.Module)

PRECISIONS = ("exact", "fast")
MAX_PLANS = 8  # of a thread, each for inputs of one shape
MAX_REASONS = 64  # against plans of other shapes or numbers
MAX_CHANGES = 4  # of the module before as many calls in a row; it is not planned until a call without one
_CPU = torch.device("cpu")


def check_precision(precision: str) -> None:
    """ValueError: an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")


def accelerate(module: M, *, precision: str = "exact", release_weights: bool = False) -> M:
    """Plans a network, so that the compiled ops compute it; returns the same module.

    From now on a call in eval mode and without gradients runs a plan, which the first call with inputs of
    these shapes makes: convolutions with the normalisations, activations and residuals around them, linear
    maps and attention. The rest stays calls of PyTorch. The module keeps its class, signature, `state_dict`
    and results. A call that cannot be planned runs the module as before; `module.report()` tells the reason.
    Weights that change in place or are replaced are noticed. Of numbers that are written through `.data`,
    whole weights are noticed by the next call, and a few numbers by one of the next 256.

    On a GPU the plan calls this package's kernels for group normalisations with their SiLU, and for
    attention, and PyTorch for all else. It can be captured as a CUDA graph after a first call. Under
    `torch.compile` the module is compiled as it came.

    module: any module in eval mode, such as the `unet` of a pipeline of diffusers.
    precision: "exact" computes in the dtype of the weights, and differs from PyTorch by rounding; "fast"
        computes the feature maps of float32 modules in bfloat16, on processors that multiply it (AVX512_BF16,
        AMX), and elsewhere as "exact" does; on a GPU, as `torch.autocast` does.
    release_weights: moves the module's parameters on the CPU out of memory, into a file without a name in the
        folder of `tempfile.gettempdir()`. The plans hold packed copies, and what else reads the parameters
        reads the file. They stay there after `restore`. Numbers written through `.data` are not noticed.
    TypeError: not a module. ValueError: an unknown precision, or a module whose `forward` was replaced.
    OSError: the disk has no place for released weights.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module, not {type(module).__name__}")
    check_precision(precision)
    restore(module)
    if "forward" in vars(module):
        raise ValueError(f"accelerate needs the forward of {type(module).__name__}, and it was replaced")
    released = ReleasedWeights(module) if release_weights else None
    _put(AcceleratedForward(module, precision, released=released), module)
    copyreg.dispatch_table.setdefault(type(module), _reduced)
    return module


def _put(forward: "AcceleratedForward", module: nn.Module) -> None:
    vars(module).update(forward=forward, report=forward.report)  # of this module, not of its class


def restore(module: M) -> M:
    """Undoes `accelerate`; returns the same module."""
    if isinstance(vars(module).get("forward"), AcceleratedForward):
        del vars(module)["forward"], vars(module)["report"]
    return module


def _reduced(module: nn.Module) -> str | tuple[Any, ...]:
    """The parts for `copy` and `pickle`. A copy that is accelerated runs itself, not the original."""
    reduced = module.__reduce_ex__(4)
    forward = vars(module).get("forward")
    if not isinstance(forward, AcceleratedForward) or isinstance(reduced, str):
        return reduced
    make, args, state, *more = reduced
    if not isinstance(state, dict):
        return reduced
    state = {name: value for name, value in state.items() if name not in ("forward", "report")}
    return _accelerated_copy, (forward.precision, make, args), state, *more


def _accelerated_copy(precision: str, make: Callable[..., nn.Module], args: tuple) -> nn.Module:
    """A module that `copy` or `pickle` gives its state next."""
    module = make(*args)
    _put(AcceleratedForward(module, precision), module)
    return module


class _Planned(NamedTuple):
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
        reason = self._unfit(device)
        if reason is None:
            leaves, structure = pytree.tree_flatten((args, kwargs))
            reason = self._unfit_inputs(leaves, device)
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
                return first[0] if first else planned.evaluate(_tensors(given))
        return plain()

    # ---- Reasons against a plan.

    def _unfit(self, device: torch.device) -> str | None:
        """The reason why no call can be planned now."""
        module = self._module
        if device.type not in ("cpu", "cuda"):
            return f"its weights are on {device}"
        if device.type == "cpu" and _native.CPP_MISSING:
            return _native.CPP_MISSING
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return "it is being compiled"
        if module.training:
            return "it is in training mode; call eval()"
        if torch.is_autocast_enabled(device.type):
            return "autocast is enabled"
        if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
            return "a forward hook is registered for all modules"
        if torch._C._len_torch_dispatch_stack():
            return "a TorchDispatchMode is active, which sees only the modules' operators"
        return intercepted() or transformed()

    def _unfit_inputs(self, leaves: list[Any], device: torch.device) -> str | None:
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if type(leaf) not in (Tensor, nn.Parameter) or leaf.layout != torch.strided:
                    return f"an input is a {type(leaf).__name__} with the layout {leaf.layout}"
                if leaf.device != device and (leaf.ndim or leaf.device.type != "cpu"):
                    return f"an input is on {leaf.device}, not on {device}"
                if torch.is_grad_enabled() and leaf.requires_grad:
                    return "an input requires a gradient"
            elif not isinstance(leaf, int | float | str | bool | torch.dtype | None):
                return f"an argument is a {type(leaf).__name__}"
        if torch.is_grad_enabled() and any(p.requires_grad for p in self._module.parameters()):
            return "a gradient is wanted; call it under torch.no_grad() or torch.inference_mode()"
        return None

    def _wants_gradient(self, planned: _Planned) -> bool:
        wanted = any(tensor.requires_grad for tensor in planned.constants)
        if wanted:
            self._last = "a gradient is wanted of a tensor that is no parameter of it"
        return wanted

    def _is_narrow(self) -> bool:
        """Whether plans may compute in 16 bits."""
        floats = [p.dtype for p in self._module.parameters() if p.is_floating_point()]
        return self.precision == "fast" or any(dtype.itemsize < 4 for dtype in floats)

    # ---- Plans.

    def _planned(
        self,
        leaves: list[Any],
        numbers: list[bool],
        structure: Any,
        device: torch.device,
        plain: Callable[[], Any],
    ) -> tuple[_Planned | None, list[Any]]:
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
                    self._last = f"its attributes cannot be followed, {_failure(error)}"
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
        plans: OrderedDict[tuple, _Planned] = vars(thread_local).setdefault("plans", OrderedDict())
        first: list[Any] = []
        if key not in plans:
            if len(plans) >= MAX_PLANS:
                plans.popitem(last=False)
                vars(thread_local).pop("pool", None)  # frees the memory that only the plan holds
            try:
                made = self._plan(leaves, numbers, structure, device)
                try:
                    first = [made.evaluate(_tensors(leaves))]
                except Exception as error:
                    raise Untraceable(_failure(error)) from error
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

    def _plan(self, leaves: list[Any], numbers: list[bool], structure: Any, device: torch.device) -> _Planned:
        from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode  # takes 0.5 s

        module = self._module
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
            args, kwargs = pytree.tree_unflatten(filled, structure)
            result = type(module).forward(module, *args, **kwargs)
            left, same = pytree.tree_flatten((args, kwargs))
            if same != structure or any(a is not b for a, b in zip(left, filled, strict=True)):
                raise Untraceable("it changes a list or dictionary among its arguments")
            return result

        try:
            held = {name: (tensor, tensor) for name, tensor in named.items()}
            try:
                graph, result = self._traced(run, given, held)
            except WrittenData:
                with fake:
                    graph, result = self._traced(run, given, held)
            arguments = list(given.values())
            given.clear()
            if are_kept(arguments):
                raise Untraceable("it keeps an argument")
            tensors = (
                number for number, leaf in zip(numbers, leaves, strict=True) if isinstance(leaf, Tensor)
            )
            if _returns_a_number(graph, list(tensors)):
                raise Untraceable("it returns a number that it computes from numbers alone")
            constants = graph.constants()
            if self._state is not None:
                self._state.watch(constants)
            plan = self._made(graph, dtype, device)
        except Untraceable:
            raise
        except DataDependentOutputException as error:
            raise Untraceable(f"it reads the values of tensors, by {error.func}") from error
        except Exception as error:
            raise Untraceable(_failure(error)) from error
        results, shape = pytree.tree_flatten(result)
        return _Planned(plan, results, shape, constants)

    def _traced(
        self,
        run: Callable[..., Any],
        given: dict[str, Tensor],
        held: dict[str, tuple[Tensor, Tensor]],
    ) -> tuple[Graph, Any]:
        try:
            traced = trace(run, given, held)
        finally:
            altered = self._state is not None and self._state.put_back()
        if altered:
            raise Untraceable("it changes its attributes as it runs")
        return traced

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
        planned: _Planned | None = getattr(self._thread_local, "last", None)
        if self._last or planned is None:
            return f"{type(self._module).__name__}: as its modules\n  not planned: {self._last}"
        lines = [f"{type(self._module).__name__}: planned, {self.precision}", *planned.plan.report(calls)]
        return "\n".join(lines)


def _failure(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _key_of(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


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
        kinds = sorted({f"{t.dtype} on {t.device}" for t in tensors})
        raise Untraceable(f"its weights are {', '.join(kinds) or 'missing'}")
    return functools.reduce(torch.promote_types, found)
