"""ModuleState: the state of a module, whose changes must be noticed by code that replaces the module."""

import copy
import itertools
import operator
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import _native

_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set, tuple)
# Of packages whose objects are not followed: they are not of networks, and may change from call to call.
_OPAQUE = (
    "PIL",
    "_io",
    "_thread",
    "builtins",
    "collections",
    "diffusers.pipelines",
    "diffusers.schedulers",
    "diffusion",
    "functools",
    "logging",
    "loguru",
    "numpy",
    "threading",
    "torch",
    "tqdm",
    "transformers",
)

DEPTH = 3
PARTS = 256  # calls of `ModuleState.holds` in which every number is compared

_version_of: Callable[[Tensor], int] = operator.attrgetter("_version")
_shape_of: Callable[[Tensor], torch.Size] = operator.attrgetter("shape")


class TensorState:
    """The addresses, layouts and versions of tensors at one time, and a digest of their numbers.

    compares_numbers: whether changes that raise no version are looked for, which reads the memory.
    """

    def __init__(self, tensors: Sequence[Tensor], compares_numbers: bool):
        self._tensors = list(tensors)
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._places = self._current_places()
        compared = self._tensors if compares_numbers else []
        # Memory is kept as long as the digest reads it.
        self._memory = [tensor.detach() for tensor in compared if tensor.device.type == "cpu"]
        self._numbers = digest_of(self._memory) if compares_numbers else None

    def _current_places(self) -> list[Any]:
        """The address and layout of each tensor, and the version, which operators that write to it raise."""
        places: list[Any] = list(map(Tensor.data_ptr, self._tensors))
        places += map(_shape_of, self._tensors)
        places += map(Tensor.stride, self._tensors)
        places += map(_version_of, self._versioned)
        return places

    def holds(self, part: int | None) -> bool:
        """Whether nothing has changed. part: of the numbers, which of PARTS is compared; None for all."""
        if self._places != self._current_places():
            return False
        if self._numbers is None:
            return True
        return self._numbers.holds() if part is None else self._numbers.holds(part, PARTS)


class ModuleState:
    """A module's submodules, attributes and tensors at one time, for a later comparison.

    The tensors are parameters, buffers, and those among other attributes and their lists and dictionaries.
    Modules in such lists count as submodules. Attributes of other objects among them count, too, such as
    those of an attention processor, up to DEPTH objects within each other, without the modules there.

    compares_numbers: whether changes that raise no version are looked for, which reads the weights.
    """

    def __init__(self, module: nn.Module, compares_numbers: bool = True):
        self._compares_numbers = compares_numbers
        self.modules: list[nn.Module] = []
        self._containers: list[Any] = []
        self._plain: list[tuple[Any, Hashable, Tensor]] = []  # tensors among attributes: where, and which
        self._find(module)
        self._types = list(map(type, self.modules))
        self._attributes = [vars(m) for m in self.modules]
        self._values = [dict(attributes) for attributes in self._attributes]
        self._contents = [copy.copy(container) for container in self._containers]
        self._owners = [owner for m in self.modules for owner in (m._parameters, m._buffers) if owner]
        self._owned = [tensor for owner in self._owners for tensor in owner.values()]
        self._identities = list(map(id, self._owned))
        tensors = [tensor for tensor in self._owned if tensor is not None]
        self._seen = {id(tensor) for tensor in tensors}
        self._tensors = [TensorState(tensors, compares_numbers)]
        self._part = 0
        self.watch(tensor for *_, tensor in self._plain)

    def _find(self, module: nn.Module) -> None:
        """Collects a module's modules, and the containers and tensors among their attributes."""
        known: set[int] = set()

        def add_module(found: nn.Module) -> None:
            for each in found.modules():
                if id(each) not in known:
                    known.add(id(each))
                    self.modules.append(each)
                    add_items(vars(each), vars(each).items(), isinstance)

        def add_items(
            owner: Any, items: Iterable[tuple[Any, Any]], is_one: Callable[..., bool], depth: int = 0
        ) -> None:
            for key, value in items:
                if isinstance(value, nn.Module):
                    is_around = any(each is module for each in value.modules())
                    if depth == 0 and not is_around:
                        add_module(value)
                elif isinstance(value, Tensor):
                    self._plain.append((owner, key, value))
                elif is_one(value, _CONTAINERS) and id(value) not in known:
                    known.add(id(value))
                    if not isinstance(value, tuple):
                        self._containers.append(value)
                    if key not in ("_parameters", "_buffers", "_modules"):
                        pairs = value.items() if isinstance(value, dict) else enumerate(value)
                        add_items(value, pairs, _is_exactly, depth)
                elif depth < DEPTH and id(value) not in known and _is_followed(value):
                    known.add(id(value))
                    self._containers.append(vars(value))
                    add_items(vars(value), vars(value).items(), _is_exactly, depth + 1)

        add_module(module)

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Looks for changes of these tensors, too, such as those that a function of the module holds."""
        new = {id(tensor): tensor for tensor in tensors if id(tensor) not in self._seen}
        if new:
            self._seen |= set(new)
            self._tensors.append(TensorState(list(new.values()), self._compares_numbers))

    def holds(self, whole: bool = False) -> bool:
        """Whether nothing has changed.

        Numbers that are written through `.data` or in inference mode raise no version, so they are compared,
        on the CPU: all of them with `whole`; otherwise a few of each tensor, and a part of all, so that PARTS
        calls compare every number.
        """
        same = self._types == list(map(type, self.modules)) and self._has_attributes()
        owned = itertools.chain.from_iterable(owner.values() for owner in self._owners)
        if not same or self._identities != list(map(id, owned)):
            return False
        self._part = (self._part + 1) % PARTS
        part = None if whole else self._part
        return all(tensors.holds(part) for tensors in self._tensors)

    def _has_attributes(self) -> bool:
        same = _equal(self._attributes, self._values) and _equal(self._containers, self._contents)
        return same and all(_item(owner, key) is tensor for owner, key, tensor in self._plain)

    def put_back(self) -> bool:
        """Gives the modules the attributes that they had, and returns whether any had changed."""
        if self._has_attributes():
            return False
        for attributes, values in zip(self._attributes, self._values, strict=True):
            attributes.clear()
            attributes.update(values)
        for container, content in zip(self._containers, self._contents, strict=True):
            if not _equal(container, content):
                _fill(container, content)
        return True

    def hooked(self) -> str | None:
        """The class of the first submodule with forward hooks, or None."""
        for module in self.modules[1:]:
            if module._forward_hooks or module._forward_pre_hooks:
                return type(module).__name__
        return None


def _equal(a: Any, b: Any) -> bool:
    try:
        return a == b
    except Exception:  # comparing two tensors or arrays with == has no single answer; a class may raise any
        return False


def _is_exactly(value: Any, classes: tuple[type, ...]) -> bool:
    return type(value) in classes


def _is_followed(value: Any) -> bool:
    """Whether a network may compute with the attributes of this object."""
    module = type(value).__module__ + "."
    if any(module.startswith(f"{package}.") for package in _OPAQUE):
        return False
    if isinstance(value, type | types.FunctionType | types.MethodType | types.ModuleType):
        return False
    try:
        return type(vars(value)) is dict
    except Exception:  # TypeError: it has none; a dead proxy raises others
        return False


def _fill(container: Any, content: Any) -> None:
    """Gives a container the content that it had, by the methods of Python's own classes."""
    kinds = (OrderedDict, dict, list, deque, set)
    kind: Any = next(kind for kind in kinds if isinstance(container, kind))
    kind.clear(container)
    (kind.extend if kind in (list, deque) else kind.update)(container, content)


def _item(owner: Any, key: Any) -> Any:
    return None if isinstance(owner, set) else owner[key]


def digest_of(tensors: Iterable[Tensor]) -> Any:
    """A `MemoryDigest` of the numbers of the tensors on the CPU; None where there is no compiled library.

    Tensors of other classes, such as quantised ones, are left out.
    """
    if _native.CPP_MISSING:
        return None
    regions = []
    for tensor in tensors:
        plain = type(tensor) is Tensor and tensor.layout == torch.strided
        if plain and tensor.device.type == "cpu" and tensor.numel():
            last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
            regions.append((tensor.data_ptr(), (last + 1) * tensor.element_size()))
    return _native.library().MemoryDigest(regions)
