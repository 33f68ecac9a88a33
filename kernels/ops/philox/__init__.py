"""Normal noise that is a pure function of (seed, sample, stream, element)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._arguments import check_integer
from ..._dispatch import Backend, Op, always
from . import native, reference, triton_launch

__all__ = ["op", "philox_normal", "validate_counters"]


def validate_counters(shape, *, seed: int, sample_ids, stream: int) -> None:
    """ValueError unless every normal of `shape` has its own 128-bit counter under a 64-bit key.

    TypeError where they are no integers.
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


def _validate(shape, *, seed, sample_ids, stream, device):
    validate_counters(shape, seed=seed, sample_ids=sample_ids, stream=stream)


op = Op(
    "philox_normal",
    {
        "cuda": Backend(native.philox_normal, native.supports_cuda),
        "cpp": Backend(native.philox_normal, native.supports_cpp),
        "triton": Backend(triton_launch.philox_normal, triton_launch.supports),
        "reference": Backend(reference.philox_normal, always),
    },
    _validate,
)


def philox_normal(
    shape: Sequence[int],
    *,
    seed: int,
    sample_ids: Tensor | Sequence[int] | None = None,
    stream: int = 0,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Standard normals, float32 of `shape` [B, ...], each a function of (seed, sample_id, stream, element).

    Philox4x32-10 (Salmon et al. 2011) with the key (seed) and the counter (block, stream, sample_id), where
    block is element // 4 and element is the C-order index within the sample; then Box-Muller (1958) on the
    block's words (0, 1) and (2, 3). A sample's noise therefore does not depend on the batch it is in.

    shape: [B, ...]; at most 2**34 elements for each sample.
    seed: in [0, 2**64).
    sample_ids: int64 [B] in [0, 2**63), default 0 .. B-1. The values of a tensor are not looked at: a
        negative one stands for the counter with its bits.
    stream: in [0, 2**32): by convention 0 for the initial noise, i + 1 for the noise of step i.
    device: where the result is.
    backend: "auto", "cuda", "cpp", "triton" or "reference"; they agree to 2 units in the last place.

    ValueError: an argument is out of range, or the backend cannot serve this call.
    TypeError: a size, seed, stream or sample id is no integer.
    """
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be [B, ...], not {shape!r}")
    return op(tuple(shape), seed=seed, sample_ids=sample_ids, stream=stream, device=device, backend=backend)
