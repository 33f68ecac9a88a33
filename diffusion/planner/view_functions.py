"""Functions that give a tensor in another shape, order or range: the option `apply` of views."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .calls import Template


def itself(tensor: Tensor) -> Tensor:
    return tensor


class Chain(NamedTuple):
    """Views one after another, as one."""

    applies: tuple[Callable[[Tensor], Tensor], ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        for apply in self.applies:
            tensor = apply(tensor)
        return tensor


@dataclass(frozen=True)
class Reshape:
    """A tensor in another shape."""

    shape: torch.Size

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(self.shape)


@dataclass(frozen=True)
class Pick:
    """One of the tensors that a call on a tensor returns."""

    template: Template
    position: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.template.run([tensor])[self.position]
