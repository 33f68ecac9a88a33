"""philox_normal as torch.library operators: the schema and the fake, the same for every backend.

`fused_diffusion::philox_normal` is implemented by the compiled libraries. sample_ids: int64 [B], contiguous.
seed: the int64 with the bits of the uint64 (`as_int64`). Returns float32 [B, elements].
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._library import define as define_operator
from .arguments import Arguments

SCHEMA = "(Tensor sample_ids, int seed, int stream, SymInt elements) -> Tensor"


def fake(sample_ids: Tensor, seed: int, stream: int, elements: int) -> Tensor:
    return sample_ids.new_empty((sample_ids.shape[0], elements), dtype=torch.float32)


def define(name: str) -> None:
    """Defines fused_diffusion::<name>, as yet without a kernel."""
    define_operator(name, SCHEMA, fake)


define("philox_normal")


def as_int64(seed: int) -> int:
    """The int64 with the bits of a uint64, since an operator's schema has no unsigned integers."""
    return seed - 2**64 if seed >= 2**63 else seed


def sample_ids_tensor(
    sample_ids: Tensor | Sequence[int] | None, batch: int, device: torch.device | str
) -> Tensor:
    """int64 [B] on the device: `sample_ids`, or 0 .. B-1 for None."""
    if sample_ids is None:
        return torch.arange(batch, device=device)
    return torch.as_tensor(sample_ids, dtype=torch.int64, device=device).contiguous()


def operator_arguments(arguments: Arguments) -> tuple[Tensor, int, int, int]:
    """The operator's arguments, from those of the public function."""
    shape, seed, sample_ids, stream, device = arguments
    ids = sample_ids_tensor(sample_ids, shape[0], device)
    return ids, as_int64(seed), stream, math.prod(shape[1:])
