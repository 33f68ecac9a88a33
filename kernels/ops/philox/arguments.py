"""The arguments of philox_normal, and which of them are valid."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._arguments import check_integer


class Arguments(NamedTuple):
    """The arguments of the public function, except `backend`."""

    shape: Sequence[int]
    seed: int
    sample_ids: Tensor | Sequence[int] | None = None
    stream: int = 0
    device: torch.device | str = "cpu"


def validate_counters(
    shape: Sequence[int], *, seed: int, sample_ids: Tensor | Sequence[int] | None, stream: int
) -> None:
    """Checks that every normal of `shape` has its own 128-bit counter under a 64-bit key.

    ValueError: an argument is out of range. TypeError: a size, seed, stream or sample id is not an integer.
    """
    for size in shape:
        check_integer("a size in shape", size)
    check_integer("seed", seed)
    check_integer("stream", stream)
    if len(shape) < 1 or any(size < 0 for size in shape):
        raise ValueError(f"shape is {tuple(shape)}, not [B, ...] with sizes of at least 0")
    if math.prod(shape[1:]) > 2**34:
        raise ValueError(f"a sample of shape {tuple(shape[1:])} has more than 2**34 elements")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}, not in [0, 2**64)")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream is {stream}, not in [0, 2**32)")
    if isinstance(sample_ids, Tensor):
        if sample_ids.dtype != torch.int64 or sample_ids.shape != (shape[0],):
            raise ValueError(
                f"sample_ids is {sample_ids.dtype} {tuple(sample_ids.shape)}, not int64 ({shape[0]},)"
            )
    elif sample_ids is not None:
        if len(sample_ids) != shape[0]:
            raise ValueError(f"there are {len(sample_ids)} sample_ids for a batch of {shape[0]}")
        for i in sample_ids:
            check_integer("a sample id", i)
        if any(not 0 <= i < 2**63 for i in sample_ids):
            raise ValueError(f"sample_ids are {list(sample_ids)}, not integers in [0, 2**63)")


def validate(arguments: Arguments) -> None:
    shape, seed, sample_ids, stream, _ = arguments
    validate_counters(shape, seed=seed, sample_ids=sample_ids, stream=stream)
