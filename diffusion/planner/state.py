"""ModuleState: what code that replaces a module must notice when it changes."""

import copy

from torch import nn


class ModuleState:
    """A module's submodules, attributes, parameters and buffers at one time, for a later comparison.

    Numbers that are written through `.data` or in inference mode are not noticed.
    """

    def __init__(self, module: nn.Module):
        self.modules = list(module.modules())
        self._types = list(map(type, self.modules))
        self._attributes = [vars(m) for m in self.modules]
        self._values = [dict(attributes) for attributes in self._attributes]
        contained = [value for values in self._values for value in values.values()]
        self._containers = [value for value in contained if isinstance(value, dict | list | set)]
        self._contents = [copy.copy(container) for container in self._containers]
        self._owners = [owner for m in self.modules for owner in (m._parameters, m._buffers) if owner]
        self._owned = [list(owner.values()) for owner in self._owners]
        self._tensors = [tensor for owned in self._owned for tensor in owned if tensor is not None]
        self._versions = self._current_versions()

    def _current_versions(self) -> list[tuple]:
        return [(t.data_ptr(), t.stride(), None if t.is_inference() else t._version) for t in self._tensors]

    def holds(self) -> bool:
        """Whether nothing has changed."""
        try:
            same = self._types == list(map(type, self.modules)) and self._attributes == self._values
            same = same and self._containers == self._contents
        except RuntimeError:  # comparing two tensors with == has no single answer
            return False
        for owner, owned in zip(self._owners, self._owned, strict=True):
            same = same and len(owner) == len(owned)
            same = same and all(a is b for a, b in zip(owner.values(), owned, strict=True))
        return same and self._versions == self._current_versions()

    def hooked(self) -> str | None:
        """The class of the first submodule with forward hooks, or None."""
        for module in self.modules[1:]:
            if module._forward_hooks or module._forward_pre_hooks:
                return type(module).__name__
        return None
