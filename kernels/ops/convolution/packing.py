"""The weights of a convolution in the order in which csrc/convolution/ read them, transformed once.

Winograd's algorithm F(m x m, 3 x 3) makes m x m outputs out of (m + 2)^2 products for each pair of channels,
instead of 9 m^2 (Lavin & Gray 2016, arXiv:1509.09308): 2.25 times fewer for m = 2 and 4 times fewer for m =
4, whose transforms, by the points 0, 1, -1, 2, -2 and infinity, cost a digit. Processors with AMX take the
direct convolution, as products of tiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..._limits import BYTE_CHUNK, CHUNK, LANES, LARGEST_DIGIT, MAX_PRODUCTS, PANEL, ZERO

SMALL_WEIGHT = 1 << 15  # C * K: transformed for m = 4, it takes 4.7 MB

# G of U = G g G^T.
_TRANSFORMS = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / 4, 0, 0),
        (-1 / 6, -1 / 6, -1 / 6),
        (-1 / 6, 1 / 6, -1 / 6),
        (1 / 24, 1 / 12, 1 / 6),
        (1 / 24, -1 / 12, 1 / 6),
        (0, 0, 1),
    ),
}


class Packing(NamedTuple):
    """How a weight is packed. tile: m of Winograd's algorithm, 0 for none.

    pairs: rounded to bfloat16, for processors that multiply pairs of it (AVX512_BF16). parts: for processors
    with AMX, which multiply tiles: 1 rounds to bfloat16, 3 makes each number of three bytes and a scale, of
    whose nine products the six largest are computed; 0 does without AMX.
    """

    tile: int = 0
    pairs: bool = False
    parts: int = 0


@dataclass(frozen=True)
class PackedWeight:
    """A convolution's weight [K, C, 3, 3] or [K, C, 1, 1], ready for the C++ backend; see `pack`.

    weight: as it was. data: float32, bfloat16 in pairs and in parts, or int8 in three parts.
    """

    weight: Tensor
    data: Tensor
    packing: Packing

    @property
    def accuracy(self) -> float:
        """What the algorithm may lose, as a share of the largest output, beyond what every kernel may."""
        tile = self.packing.tile
        if self.packing.pairs or self.packing.parts == 1:
            return {0: 6e-3, 2: 1e-2, 4: 0.2}[tile]
        return {0: 0.0, 2: 0.0, 4: 2e-5}[tile]

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape


def _factors(weight: Tensor, tile: int) -> Tensor:
    """float64 [frequencies or taps, C, K]."""
    if not tile:
        return weight.permute(2, 3, 1, 0).flatten(0, 1)
    transform = torch.tensor(_TRANSFORMS[tile], dtype=torch.float64, device="cpu")
    return torch.einsum("ia,kcab,jb->ijck", transform, weight, transform).flatten(0, 1)


def _vector_panels(weight: Tensor, packing: Packing) -> Tensor:
    """[frequency or 1, words of all panels], a panel being [rows / pack][columns][pack] for each factor."""
    k, c = weight.shape[:2]
    pack = 2 if packing.pairs else 1
    dtype = torch.bfloat16 if packing.pairs else torch.float32
    rows, columns = -(-c // pack) * pack, -(-k // LANES) * LANES
    panels = []
    for panel in weight.split(PANEL):  # a panel at a time: float64 is large
        factors = _factors(panel.double(), packing.tile)
        padded = factors.new_zeros(len(factors), rows, min(PANEL, columns - PANEL * len(panels)))
        padded[:, :c, : factors.shape[2]] = factors
        words = padded.to(dtype).unflatten(1, (-1, pack)).transpose(2, 3)  # [F, rows / pack, K, pack]
        panels.append(words.flatten(1) if packing.tile else words.reshape(1, -1))
    return torch.cat(panels, 1)


def _merged(weight: Tensor) -> Tensor:
    """A weight whose few channels stand beside those of the next taps, as merge_pixels makes pixels stand."""
    k, c, height, width = weight.shape
    own = -(-c // LANES) * LANES
    beside = min(width, BYTE_CHUNK // own) if c else 1
    if beside < 2:
        return weight
    taps = -(-width // beside)
    wide = weight.new_zeros(k, own, height, taps * beside)
    wide[:, :c, :, :width] = weight
    return wide.unflatten(3, (taps, beside)).permute(0, 4, 1, 2, 3).flatten(1, 2)


def _tile_panels(weight: Tensor) -> Tensor:
    """bfloat16 [words of all panels], a panel of 32 outputs being [chunk of 32 channels][tap][tile].

    A tile is [pair of channels][16 outputs][2].
    """
    c = weight.shape[1]
    panels = []
    for panel in weight.split(2 * LANES):
        factors = _factors(panel.bfloat16(), 0)
        rows, columns = -(-c // CHUNK) * CHUNK, -(-len(panel) // LANES) * LANES
        wide = factors.new_zeros(len(factors), rows, columns)
        wide[:, :c, : len(panel)] = factors
        tiles = wide.unflatten(2, (-1, LANES)).unflatten(1, (-1, CHUNK // 2, 2))
        panels.append(tiles.permute(1, 0, 4, 2, 5, 3).flatten())  # of [tap, chunk, pair, 2, tile, 16]
    return torch.cat(panels)


def _shares(weight: Tensor) -> Tensor:
    """float64 [C]: powers of two, by which inputs are multiplied and weights divided.

    The weights of all channels are then about as large, and so an input is as large as what it contributes.
    """
    if weight.numel() == 0:
        return torch.ones(weight.shape[1], dtype=torch.float64, device="cpu")
    largest = weight.abs().amax((0, 2, 3)).double()
    ratio = (largest / largest.max().clamp_min(2.0**-149)).clamp(2.0**-60, 1)
    return torch.exp2(ratio.log2().round())


def _byte_panels(weight: Tensor) -> Tensor:
    """int8 [bytes]: float32 shares of the channels, padded to 64, and then the panels, a panel of 16 outputs
    being their scales, in float32, for each digit the outputs' sums times ZERO, in int32, and then
    [chunk of 64 channels][tap][digit][tile].

    A tile is [four channels][16 outputs][4]; within a chunk, channel 16 j + 4 i + k is at 16 i + 4 j + k.
    """
    shares = _shares(weight)
    padded = shares.new_zeros(-(-len(shares) // BYTE_CHUNK) * BYTE_CHUNK)
    padded[: len(shares)] = shares
    wide = _merged(weight.double() / shares[:, None, None])
    k, c, height, width = wide.shape
    panels, chunks, taps = -(-k // LANES), -(-c // BYTE_CHUNK), height * width
    numbers = wide.new_zeros(panels * LANES, taps, chunks * BYTE_CHUNK)
    numbers[:k, :, :c] = wide.permute(0, 2, 3, 1).flatten(1, 2)
    largest = numbers.abs().flatten(1).amax(1) if numbers.numel() else numbers.new_zeros(panels * LANES)
    scales = (largest / LARGEST_DIGIT).float().clamp_min(2.0**-126)
    numbers *= 2.0**16 / scales.double()[:, None, None]
    whole = (numbers.round_().int() + 0x808080) ^ 0x808080  # bytes: third digit, second, first, and one more
    digits = whole.view(torch.int8).unflatten(2, (chunks, 4, 4, 4, 4))  # [..., chunk, j, i, k, byte]
    digits = digits.unflatten(0, (panels, LANES))[..., [2, 1, 0]]
    tiles = digits.permute(0, 3, 2, 7, 5, 4, 1, 6)  # [panel, chunk, tap, digit, i, j, output, k]
    sums = ZERO * digits.flatten(2, 6).sum(2, dtype=torch.int32).transpose(1, 2)  # [panel, digit, output]
    heads = torch.stack([scales.view(panels, LANES), *sums.contiguous().view(torch.float32).unbind(1)], 1)
    bytes = torch.cat([heads.flatten(1).view(torch.int8), tiles.flatten(1)], 1)
    return torch.cat([padded.float().view(torch.int8), bytes.flatten()])


def pack(weight: Tensor, packing: Packing) -> PackedWeight:
    """Packs a weight [K, C, 3, 3], or, without a tile, [K, C, 1, 1].

    Winograd's transform is in float64 and rounds once. NaN, infinity and what overflows in the transform
    would reach more outputs than their own in tiles and in bytes; such a weight is packed for the direct
    convolution.
    """
    height, width = weight.shape[2:]
    tile, pairs, parts = packing
    known = tile in (0, 2, 4) and parts in (0, 1, 3) and not (parts and (tile or pairs))
    if not known or height != width or height not in (1, 3) or (tile and height != 3):
        raise ValueError(f"a weight {list(weight.shape)} cannot be packed as {packing}")
    plain = weight.detach().cpu()
    if parts == 3 and plain[:1].numel() > MAX_PRODUCTS:
        raise ValueError(f"a weight {list(weight.shape)} is too large for {packing}")
    if parts == 3 and not plain.isfinite().all():
        packing = Packing()
    if packing.parts:
        panels = _tile_panels(plain) if parts == 1 else _byte_panels(plain)
    else:
        panels = _vector_panels(plain, packing)
    if tile and not panels.isfinite().all():
        return pack(weight, Packing(pairs=pairs))
    return PackedWeight(weight.detach(), panels, packing)


def choose_packing(
    shape: Sequence[int], height: int, width: int, dtype: torch.dtype, simd: str, winograd: bool = True
) -> Packing:
    """How a convolution by a weight [K, C, 3, 3] or [K, C, 1, 1] to a map of this size takes the least time.

    dtype: of the maps. simd: the instruction set. winograd: whether the convolution is one for Winograd's
    algorithm, 3 x 3 with stride and padding 1. By benchmarks/test_ops.py. It does not depend on the batch, so
    that an image does not either. Where a map is small and the weight is not, the weight is most of what is
    read, and it grows with the tile; the transforms of few channels cost more than they save. AMX needs
    neither, but its chunks are too empty with very few channels. Rounded to bfloat16, F(4 x 4, 3 x 3) would
    lose too much: up to a tenth of the largest output.
    """
    halves, few = dtype == torch.bfloat16, shape[1] < 8
    least, small = min(height, width), shape[0] * shape[1] <= SMALL_WEIGHT
    pairs, transformed = halves and simd in ("avx512_bf16", "amx"), winograd and least >= 3
    if simd == "amx" and not few and (halves or math.prod(shape[1:]) <= MAX_PRODUCTS):
        return Packing(parts=1 if halves else 3)
    if few or not transformed:
        return Packing(pairs=pairs)
    return Packing(4 if not pairs and least >= (6 if small else 12) else 2, pairs)
