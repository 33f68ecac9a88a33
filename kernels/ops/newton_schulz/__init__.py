"""The iteration by which Muon orthogonalises a matrix: csrc/newton_schulz/newton_schulz.cpp.

Only the optimizer calls it. It is not a public op, so `OPS` is empty.
"""

import torch

from ... import _native
from ..._registry import PublicOp
from .library import newton_schulz as newton_schulz

__all__: list[str] = []
OPS: tuple[PublicOp, ...] = ()


def supports(device: torch.device) -> bool:
    """Whether `newton_schulz` runs on the device: on CPUs with AMX."""
    return device.type == "cpu" and not _native.CPP_MISSING and _native.simd_in_use() == "amx"
