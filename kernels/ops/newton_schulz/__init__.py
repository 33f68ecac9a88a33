"""The iteration by which Muon orthogonalises a matrix: csrc/newton_schulz/newton_schulz.cpp.

Only the optimizer calls it. It is not a public op, so `OPS` is empty.
"""

import torch

from ... import _native
from ..._registry import InternalOp, PublicOp
from .library import newton_schulz as newton_schulz

__all__: list[str] = []
OPS: tuple[PublicOp, ...] = ()


def _missing() -> str | None:
    if _native.CPP_MISSING or _native.simd_in_use() == "amx":
        return _native.CPP_MISSING
    return f"it multiplies by AMX, and the instruction set in use is {_native.simd_in_use()}"


INTERNAL = (InternalOp("newton_schulz", "the optimizer muon", _missing),)


def supports(device: torch.device) -> bool:
    """Whether `newton_schulz` runs on the device: on CPUs with AMX."""
    return device.type == "cpu" and _missing() is None
