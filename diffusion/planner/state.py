"""ModuleState: what code that replaces a module must notice when it changes."""

import copy
import itertools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import _native

PARTS = 256  # calls of `ModuleState.holds` in which every number is compared

_version_of: Callable[[Tensor], int] = operator.attrgetter("_version")


class ModuleState:
    """A module's submodules, attributes, parameters and buffers at one time, for a later comparison.

    compares_numbers: whether changes that raise no version are looked for, which reads the weights.
    """

    def __init__(self, module: nn.Module, compares_numbers: bool = True):
        self.modules = list(module.modules())
        self._types = list(map(type, self.modules))
        self._attributes = [vars(m) for m in self.modules]
        self._values = [dict(attributes) for attributes in self._attributes]
        contained = [value for values in self._values for value in values.values()]
        self._containers = [value for value in contained if isinstance(value, dict | list | set)]
        self._contents = [copy.copy(container) for container in self._containers]
        self._owners = [owner for m in self.modules for owner in (m._parameters, m._buffers) if owner]
        self._owned = [tensor for owner in self._owners for tensor in owner.values()]
        self._identities = list(map(id, self._owned))
        self._tensors = [tensor for tensor in self._owned if tensor is not None]
        self._versioned = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._places = self._current_places()
        compared = self._tensors if compares_numbers else []
        # Memory is kept as long as the digest reads it.
        self._memory = [tensor.detach() for tensor in compared if tensor.device.type == "cpu"]
        self._numbers = digest_of(self._memory) if compares_numbers else None
        self._part = 0

    def _current_places(self) -> list[Any]:
        """The address and layout of each tensor, and the version, which operators that write to it raise."""
        places: list[Any] = list(map(Tensor.data_ptr, self._tensors))
        places += map(Tensor.stride, self._tensors)
        places += map(_version_of, self._versioned)
        return places

    def holds(self, whole: bool = False) -> bool:
        """Whether nothing has changed.

        Numbers that are written through `.data` or in inference mode raise no version, so they are compared,
        on the CPU: all of them with `whole`; otherwise a few of each tensor, and a part of all, so that PARTS
        calls compare every number.
        """
        same = self._types == list(map(type, self.modules)) and self._has_attributes()
        owned = itertools.chain.from_iterable(owner.values() for owner in self._owners)
        if not same or self._identities != list(map(id, owned)) or self._places != self._current_places():
            return False
        if self._numbers is None:
            return True
        self._part = (self._part + 1) % PARTS
        return self._numbers.holds() if whole else self._numbers.holds(self._part, PARTS)

    def _has_attributes(self) -> bool:
        try:
            return self._attributes == self._values and self._containers == self._contents
        except RuntimeError:  # comparing two tensors with == has no single answer
            return False

    def put_back(self) -> bool:
        """Gives the modules the attributes that they had, and returns whether any had changed."""
        if self._has_attributes():
            return False
        for attributes, values in zip(self._attributes, self._values, strict=True):
            attributes.clear()
            attributes.update(values)
        for container, content in zip(self._containers, self._contents, strict=True):
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        return True

    def hooked(self) -> str | None:
        """The class of the first submodule with forward hooks, or None."""
        for module in self.modules[1:]:
            if module._forward_hooks or module._forward_pre_hooks:
                return type(module).__name__
        return None


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
