"""Converts a foreign state dict into that of this package's UNet, by pairs of names.

The UNets hold the same tensors, with two exceptions. The package joins q, k and v of an attention into one
matrix. It also joins the embedding's projections of all residual blocks into one, in the order in which the
blocks run.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from ..storage.reading import check_weights


class Parts(NamedTuple):
    """Pairs of a prefix in the package's UNet and the foreign prefix, in the order of execution."""

    plain: list[tuple[str, str]]  # one weight and bias, or a table of weights
    residual: list[tuple[str, str]]
    attention: list[tuple[str, str]]
    tensors: tuple[tuple[str, str], ...] = ()  # single tensors, by their whole names


class Source:
    """A foreign state dict from which each tensor is taken once.

    origin: its name in messages. ValueError for a tensor that is not a weight.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], origin: str):
        check_weights(tensors, origin)
        self.tensors, self.origin = dict(tensors), origin

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def take(self, name: str) -> torch.Tensor:
        """Removes and returns a tensor; ValueError if no tensor has this name."""
        if name not in self.tensors:
            raise ValueError(f"{self.origin} is of another architecture than its configuration: no {name}")
        return self.tensors.pop(name)

    def layer(
        self, name: str, foreign: str, kinds: Iterable[str] = ("weight", "bias")
    ) -> dict[str, torch.Tensor]:
        """Takes the tensors of the foreign layer, under the name of the package's: {"NAME.weight": ...}."""
        return {f"{name}.{kind}": self.take(f"{foreign}.{kind}") for kind in kinds}

    def peek(self, name: str, dims: int) -> torch.Tensor:
        """A tensor, to read its shape; ValueError if no tensor of so many dimensions has this name."""
        if name not in self.tensors or self.tensors[name].ndim != dims:
            raise ValueError(f"{self.origin} has no {name} of {dims} dimensions")
        return self.tensors[name]

    def finish(self) -> None:
        """ValueError if a tensor was not taken."""
        if self.tensors:
            raise ValueError(
                f"{self.origin} is of another architecture than its configuration: "
                f"{len(self.tensors)} tensors too many, such as {min(self.tensors)}"
            )


def convert(
    source: Source,
    parts: Parts,
    residual_names: dict[str, str],
    embedding_name: str,
    take_attention: Callable[[Source, str], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """The state dict of the package's UNet from a foreign one.

    residual_names: the package's names within a residual block -> the foreign names; `skip` may be absent.
    embedding_name: the foreign name of a block's projection of the embedding. take_attention: (source,
    foreign prefix) -> the package's tensors of one attention. ValueError if tensors are missing or left over.
    """
    ours: dict[str, torch.Tensor] = {}

    def copy(name: str, foreign: str) -> None:
        kinds = [kind for kind in ("weight", "bias") if kind == "weight" or f"{foreign}.bias" in source]
        ours.update(source.layer(name, foreign, kinds))

    for name, foreign in parts.plain:
        copy(name, foreign)
    for name, foreign in parts.tensors:
        ours[name] = source.take(foreign)
    projections: dict[str, list[torch.Tensor]] = {"weight": [], "bias": []}
    for name, foreign in parts.residual:
        for inner, foreign_inner in residual_names.items():
            if inner != "skip" or f"{foreign}.{foreign_inner}.weight" in source:
                copy(f"{name}.{inner}", f"{foreign}.{foreign_inner}")
        for kind, rows in projections.items():
            rows.append(source.take(f"{foreign}.{embedding_name}.{kind}"))
    for kind, rows in projections.items():
        ours[f"embedding_projection.{kind}"] = torch.cat(rows)
    for name, foreign in parts.attention:
        for inner, tensor in take_attention(source, foreign).items():
            ours[f"{name}.{inner}"] = tensor
    source.finish()
    return ours


def separate_attention(
    norm: str, query: str, key: str, value: str, proj: str
) -> Callable[[Source, str], dict[str, torch.Tensor]]:
    """The `take_attention` of an attention whose q, k and v are linear layers or 1x1 convolutions of their
    own. The arguments are the foreign names within the attention."""

    def take(source: Source, foreign: str) -> dict[str, torch.Tensor]:
        ours = {}
        for kind in ("weight", "bias"):
            qkv = torch.cat([source.take(f"{foreign}.{name}.{kind}") for name in (query, key, value)])
            out = source.take(f"{foreign}.{proj}.{kind}")
            ours[f"qkv.{kind}"] = qkv.flatten(1) if kind == "weight" else qkv
            ours[f"proj.{kind}"] = out.flatten(1) if kind == "weight" else out
            ours[f"norm.{kind}"] = source.take(f"{foreign}.{norm}.{kind}")
        return ours

    return take
