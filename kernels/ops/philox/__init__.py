"""Normal noise that is a pure function of (seed, sample, stream, element)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._dispatch import Backend, Op, always
from ..._registry import PublicOp
from . import native, reference, triton_launch
from .arguments import Arguments, validate

__all__ = ["philox_normal"]

op = Op(
    "philox_normal",
    {
        "cuda": Backend(native.philox_normal, native.supports_cuda),
        "cpp": Backend(native.philox_normal, native.supports_cpp),
        "triton": Backend(triton_launch.philox_normal, triton_launch.supports),
        "reference": Backend(reference.philox_normal, always),
    },
    validate,
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
    block's uint32 (0, 1) and (2, 3). A sample's noise therefore does not depend on the batch it is in.

    shape: [B, ...]; at most 2**34 elements for each sample.
    seed: in [0, 2**64).
    sample_ids: int64 [B] in [0, 2**63), default 0 .. B-1. The values of a tensor are not checked: a
        negative one stands for the counter with its bits.
    stream: in [0, 2**32): by convention 0 for the initial noise, i + 1 for the noise of step i.
    device: that of the result.
    backend: "auto", "cuda", "cpp", "triton" or "reference"; they agree to 2 units in the last place.

    ValueError: an argument is out of range, or the backend cannot serve this call.
    TypeError: a size, seed, stream or sample id is not an integer.
    """
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape must be [B, ...], not {shape!r}")
    return op(Arguments(tuple(shape), seed, sample_ids, stream, device), backend)


OPS = (
    PublicOp(philox_normal, op, Arguments, lambda device: Arguments((2, 32, 8, 8), seed=0, device=device)),
)
