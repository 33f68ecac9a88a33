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
class Range:
    """A range of a tensor along one dimension."""

    dimension: int
    start: int
    size: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.narrow(self.dimension, self.start, self.size)


@dataclass(frozen=True)
class Heads:
    """A tensor in the order `order` of its dimensions, the first ones of which are images and heads.

    images: N, where one dimension counts images and heads; else None.
    """

    order: tuple[int, ...]
    images: int | None

    def __call__(self, tensor: Tensor) -> Tensor:
        tensor = tensor.permute(self.order)
        if self.images is None:
            return tensor
        return tensor.reshape(self.images, tensor.shape[0] // self.images, *tensor.shape[1:])


@dataclass(frozen=True)
class MergedHeads:
    """The reverse of Heads, for its result in the order `order`."""

    order: tuple[int, ...]
    images: int | None

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.images is not None:
            tensor = tensor.reshape(tensor.shape[0] * tensor.shape[1], *tensor.shape[2:])
        return tensor.permute(self.order)


@dataclass(frozen=True)
class Pick:
    """One of the tensors that a call on a tensor returns."""

    template: Template
    position: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.template.run([tensor])[self.position]
