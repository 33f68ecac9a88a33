"""The iteration by which Muon orthogonalises a matrix: csrc/newton_schulz/newton_schulz.cpp."""

import torch

from ... import _native

# x: bfloat16 [m, n], contiguous, m <= n. Returns bfloat16 [m, n]: x after `steps` times
# x <- a x + (b G + c G G) x, where G = x x^T.
torch.library.define(
    "fused_diffusion::newton_schulz", "(Tensor x, int steps, float a, float b, float c) -> Tensor"
)


@torch.library.register_fake("fused_diffusion::newton_schulz")
def _fake(x, steps, a, b, c):
    return torch.empty_like(x)


newton_schulz = torch.ops.fused_diffusion.newton_schulz


def supports(device: torch.device) -> bool:
    """Whether `newton_schulz` runs on the device: on CPUs with AMX."""
    return device.type == "cpu" and not _native.CPP_MISSING and _native.simd_in_use() == "amx"
