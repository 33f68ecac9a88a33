"""Philox4x32-10 and Box-Muller in plain PyTorch, the truth for every other backend."""

import math

import torch
from torch import Tensor

from .arguments import Arguments

UINT32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


def _multiply(constant: int, value: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * value; int64 holds every intermediate without overflow."""
    low = constant * (value & 0xFFFF)
    high = constant * (value >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_bits(counter: Tensor, seed: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011) of each counter [..., 4]: four uint32, held in int64."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = seed & UINT32, seed >> 32
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & UINT32, (k1 + WEYL[1]) & UINT32
    return torch.stack([c0, c1, c2, c3], -1)


def box_muller(integers: Tensor) -> Tensor:
    """Two float32 normals for each pair of uint32 (held in int64), [..., 2] -> [..., 2].

    The uniforms are float32; the logarithm, root and rotation are float64, rounded once at the end.
    """
    u = (integers.to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    radius = torch.sqrt(-2 * torch.log(u[..., 0]))
    quarter = torch.round(4 * u[..., 1])  # the angle is reduced in turns, where that is exact
    angle = (4 * u[..., 1] - quarter) * (math.pi / 2)
    cos, sin, quarter = torch.cos(angle), torch.sin(angle), quarter.long()
    cos, sin = torch.where(quarter % 2 == 1, -sin, cos), torch.where(quarter % 2 == 1, cos, sin)
    radius = torch.where(quarter // 2 == 1, -radius, radius)
    return torch.stack([radius * cos, radius * sin], -1).float()


def philox_normal(arguments: Arguments) -> Tensor:
    shape, seed, sample_ids, stream, device = arguments
    device = torch.device(device)
    work = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    ids = torch.arange(shape[0], device=work) if sample_ids is None else sample_ids
    ids = torch.as_tensor(ids, dtype=torch.int64, device=work)
    elements = math.prod(shape[1:])
    blocks = torch.arange((elements + 3) // 4, device=work)
    grid = ids[:, None].expand(-1, len(blocks))
    counter = torch.stack(
        [blocks.expand_as(grid), torch.full_like(grid, stream), grid & UINT32, (grid >> 32) & UINT32], -1
    )
    bits = philox_bits(counter, seed)
    normals = box_muller(bits.unflatten(-1, (2, 2))).reshape(len(ids), 4 * len(blocks))
    return normals[:, :elements].reshape(shape).to(device)
