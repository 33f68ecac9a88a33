"""Packs the weight of a convolution in the order in which csrc/convolution/ reads it: docs/packed-weights.md.

Winograd's algorithm F(m x m, 3 x 3) computes m x m outputs from (m + 2)^2 products for each pair of channels,
instead of 9 m^2 (Lavin & Gray 2016, arXiv:1509.09308): 2.25 times fewer for m = 2, and 4 times fewer for
m = 4. The points for m = 4 are 0, NEAR, -NEAR, FAR, -FAR and infinity. The usual 1 and 2 in place of NEAR and
FAR lose twice as much to rounding.
Processors with AMX compute the direct convolution, as products of tiles.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..._limits import BYTE_CHUNK, CHUNK, LANES, LARGEST_LIMB, MAX_PRODUCTS, PANEL, ZERO

PACKED_AT_ONCE = 1 << 17  # numbers, whose float64 stay in a core's cache
SMALL_WEIGHT = 1 << 15  # C * K; transformed for m = 4, such a weight takes 4.7 MB

NEAR, FAR = 5 / 8, 3 / 2  # with the least error among fractions whose powers are exact in float32


def _rows_of_points(p: float, q: float) -> tuple[tuple[float, float, float], ...]:
    """Rows of G for the points p and -p of 0, p, -p, q, -q and infinity."""
    differences = 2 * p**2 * (p**2 - q**2)  # the product of p - x over the other finite points x
    return tuple((1 / differences, s * p / differences, p**2 / differences) for s in (1, -1))


# G of U = G g G^T.
_TRANSFORMS = {
    2: ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    4: (
        (1 / (NEAR * FAR) ** 2, 0, 0),
        *_rows_of_points(NEAR, FAR),
        *_rows_of_points(FAR, NEAR),
        (0, 0, 1),
    ),
}


class Packing(NamedTuple):
    """The format of a packed weight.

    winograd_m: m of Winograd's algorithm, 2 or 4; 0 for the direct convolution.
    bf16_pairs: pairs of channels, rounded to bfloat16, for AVX512_BF16.
    amx_limbs: tiles for AMX; 0 without AMX. 1: one bfloat16 for each number. 3: three int8 limbs and a scale;
    of the nine products of two numbers' limbs, the six largest are computed.
    panel: output channels whose weights lie together, 64 or 16. It is as many as the sums of a row in a
    processor's registers, or a multiple; at 64, AVX2's 16 would be a quarter of each line, so that the
    first cache holds fewer of them.
    """

    winograd_m: int = 0
    bf16_pairs: bool = False
    amx_limbs: int = 0
    panel: int = PANEL


@dataclass(frozen=True)
class PackedWeight:
    """A convolution's weight [K, C, 3, 3] or [K, C, 1, 1], ready for the C++ backend; see `pack`.

    weight: the original weight. data: float32, bfloat16 (bf16_pairs, or amx_limbs = 1) or int8.
    """

    weight: Tensor
    data: Tensor
    packing: Packing

    @property
    def accuracy(self) -> float:
        """The algorithm's allowed extra error, relative to the largest output; see `_tolerance.wrong`."""
        m = self.packing.winograd_m
        if self.packing.bf16_pairs or self.packing.amx_limbs == 1:
            return {0: 6e-3, 2: 1e-2, 4: 0.2}[m]
        return {0: 0.0, 2: 0.0, 4: 2e-5}[m]

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape


def _factors(weight: Tensor, winograd_m: int) -> Tensor:
    """float64 [frequencies or taps, C, K]."""
    if not winograd_m:
        return weight.permute(2, 3, 1, 0).flatten(0, 1)
    transform = torch.tensor(_TRANSFORMS[winograd_m], dtype=torch.float64, device="cpu")
    return torch.einsum("ia,kcab,jb->ijck", transform, weight, transform).flatten(0, 1)


def _vector_panels(weight: Tensor, packing: Packing) -> Tensor:
    """[frequency or 1, numbers of all panels]; a panel is [rows / pack][columns][pack] for each factor."""
    k, c = weight.shape[:2]
    pack = 2 if packing.bf16_pairs else 1
    dtype = torch.bfloat16 if packing.bf16_pairs else torch.float32
    rows, columns = -(-c // pack) * pack, -(-k // LANES) * LANES
    panels: list[Tensor] = []
    for panel in weight.split(packing.panel):  # one panel at a time, since float64 takes twice the memory
        factors = _factors(panel.double(), packing.winograd_m)
        width = min(packing.panel, columns - packing.panel * len(panels))
        padded = factors.new_zeros(len(factors), rows, width)
        padded[:, :c, : factors.shape[2]] = factors
        rounded = padded.to(dtype).unflatten(1, (-1, pack)).transpose(2, 3)  # [F, rows / pack, K, pack]
        panels.append(rounded.flatten(1) if packing.winograd_m else rounded.reshape(1, -1))
    return torch.cat(panels, 1)


def _merge_taps(weight: Tensor) -> Tensor:
    """Concatenates neighbouring horizontal taps along C: few input channels would not fill a row of 64 bytes.

    merge_pixels (csrc/convolution/amx_inputs.h) merges the pixels of the input in the same order.
    """
    k, c, height, width = weight.shape
    padded = -(-c // LANES) * LANES
    merged = min(width, BYTE_CHUNK // padded) if c else 1
    if merged < 2:
        return weight
    taps = -(-width // merged)
    wide = weight.new_zeros(k, padded, height, taps * merged)
    wide[:, :c, :, :width] = weight
    return wide.unflatten(3, (taps, merged)).permute(0, 4, 1, 2, 3).flatten(1, 2)


def _bf16_tile_panels(weight: Tensor) -> Tensor:
    """bfloat16 [numbers of all panels]; a panel of 32 outputs is [chunk of 32 channels][tap][tile].

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
        panels.append(tiles.permute(1, 0, 4, 2, 5, 3).flatten())  # from [tap, chunk, pair, 2, tile, 16]
    return torch.cat(panels)


def _channel_scales(weight: Tensor) -> Tensor:
    """float64 [C]: powers of two; inputs are multiplied by them and weights divided.

    The weights of all channels are then about equally large, so that the range of int8 follows each input
    channel's contribution to the output.
    """
    if weight.numel() == 0:
        return torch.ones(weight.shape[1], dtype=torch.float64, device="cpu")
    largest = torch.maximum(weight.amax((0, 2, 3)), -weight.amin((0, 2, 3))).double()
    ratio = (largest / largest.max().clamp_min(2.0**-149)).clamp(2.0**-60, 1)
    return torch.exp2(ratio.log2().round())


def _int8_tile_panels(weight: Tensor) -> Tensor:
    """int8 [bytes]: the float32 scales of the input channels, padded to 64, and then the panels.

    A panel of 16 outputs begins with their scales, float32, and for each limb the outputs' sums of that limb
    times ZERO, int32. Then follows [chunk of 64 channels][tap][limb][tile]. A tile is
    [four channels][16 outputs][4]; within a chunk, channel 16 j + 4 i + k is at 16 i + 4 j + k.
    """
    channel_scales = _channel_scales(weight)
    padded = channel_scales.new_zeros(-(-len(channel_scales) // BYTE_CHUNK) * BYTE_CHUNK)
    padded[: len(channel_scales)] = channel_scales
    rows = LANES * max(1, PACKED_AT_ONCE // max(1, LANES * weight[:1].numel()))
    parts = weight.split(rows) if len(weight) else ()
    panels = [_int8_panels(part, channel_scales).flatten() for part in parts]
    return torch.cat([padded.float().view(torch.int8), *panels])


def _int8_panels(weight: Tensor, channel_scales: Tensor) -> Tensor:
    """int8 [panels, bytes of a panel]."""
    wide = _merge_taps(weight.double() / channel_scales[:, None, None])
    k, c, height, width = wide.shape
    panels, chunks, taps = -(-k // LANES), -(-c // BYTE_CHUNK), height * width
    numbers = wide.new_zeros(panels * LANES, taps, chunks * BYTE_CHUNK)
    numbers[:k, :, :c] = wide.permute(0, 2, 3, 1).flatten(1, 2)
    largest = numbers.abs().flatten(1).amax(1) if numbers.numel() else numbers.new_zeros(panels * LANES)
    scales = (largest / LARGEST_LIMB).float().clamp_min(2.0**-126)
    numbers *= 2.0**16 / scales.double()[:, None, None]
    # The sum carries, so that the bytes 2, 1 and 0 are the limbs, once each is read as an int8.
    integers = numbers.round_().int().add_(0x808080).bitwise_xor_(0x808080)
    sums, tiles = [], []
    for shift in (8, 16, 24):
        limb = (integers << shift) >> 24
        sums.append(ZERO * limb.flatten(1).sum(1, dtype=torch.int32).view(panels, LANES))
        fours = limb.to(torch.int8).view(torch.int32)  # four channels of one output are neighbours in a tile
        tiles.append(fours.view(panels, LANES, taps, chunks, 4, 4).permute(0, 3, 2, 5, 4, 1))
    heads = torch.stack([scales.view(panels, LANES).view(torch.int32), *sums], 1).flatten(1)
    bytes_of_tiles = torch.stack(tiles, 3).flatten(1)  # [panel, chunk, tap, limb, i, j, output]
    return torch.cat([heads, bytes_of_tiles], 1).view(torch.int8)


def interleave_gates(tensor: Tensor, packing: Packing) -> Tensor:
    """The rows of a GEGLU layer's weight or bias [2 M, ...] in `convolution_`'s order for "geglu".

    The first M rows make the values and the others the gates, as in diffusers' GEGLU. In tiles of bfloat16,
    16 values come before their 16 gates, with rows of zeros where M is not a multiple of 16; elsewhere values
    and gates take turns.
    """
    values, gates = tensor.chunk(2)
    run = LANES if packing.amx_limbs == 1 else 1
    padding = values.new_zeros(-len(values) % run, *values.shape[1:])
    halves = [torch.cat([half, padding]).unflatten(0, (-1, run)) for half in (values, gates)]
    return torch.stack(halves, 1).flatten(0, 2)


def pack(weight: Tensor, packing: Packing) -> PackedWeight:
    """Packs a weight [K, C, 3, 3], or [K, C, 1, 1] for the direct convolution.

    Winograd's transform is in float64 and rounds once. A NaN, an infinity or an overflow in the transform
    would reach outputs that do not read it, in Winograd's algorithm and in int8; such a weight is packed for
    the direct convolution. ValueError: a shape or a format that does not exist, or too many products for
    int8.
    """
    height, width = weight.shape[2:]
    m, bf16_pairs, limbs, panel = packing
    known = m in (0, 2, 4) and limbs in (0, 1, 3) and not (limbs and (m or bf16_pairs))
    known = known and panel in (LANES, PANEL)
    if not known or height != width or height not in (1, 3) or (m and height != 3):
        raise ValueError(f"a weight {list(weight.shape)} cannot be packed as {packing}")
    plain = weight.detach().cpu()
    if limbs == 3 and plain[:1].numel() > MAX_PRODUCTS:
        raise ValueError(f"a weight {list(weight.shape)} is too large for {packing}")
    if limbs == 3 and not plain.isfinite().all():
        packing = Packing()
    if packing.amx_limbs:
        panels = _bf16_tile_panels(plain) if limbs == 1 else _int8_tile_panels(plain)
    else:
        panels = _vector_panels(plain, packing)
    if m and not panels.isfinite().all():
        return pack(weight, Packing(bf16_pairs=bf16_pairs, panel=panel))
    return PackedWeight(weight.detach(), panels, packing)


def panel_of(simd: str) -> int:
    """The output channels of a panel that an instruction set reads fastest."""
    return LANES if simd in ("baseline", "avx2") else PANEL


def choose_packing(
    shape: Sequence[int], height: int, width: int, dtype: torch.dtype, simd: str, winograd: bool = True
) -> Packing:
    """The format with which a convolution takes the least time.

    shape: [K, C, 3, 3] or [K, C, 1, 1], of the weight.
    height, width, dtype: of the output map.
    simd: the instruction set.
    winograd: whether Winograd's algorithm applies, to a filter of 3 x 3 with stride and padding 1.

    The limits come from benchmarks/test_ops.py. They do not depend on the size of the batch, so that an
    image's result does not either. Where the map is small and the weight is not, most bytes read are the
    weight's, which grows with m. With few channels, the transforms take more time than they save. AMX needs
    no transform; below 8 channels its tiles are mostly padding. F(4 x 4, 3 x 3) rounded to bfloat16
    would lose up to a tenth of the largest output.
    """
    bf16, few = dtype == torch.bfloat16, shape[1] < 8
    side, small = min(height, width), shape[0] * shape[1] <= SMALL_WEIGHT
    bf16_pairs, transformed = bf16 and simd in ("avx512_bf16", "amx"), winograd and side >= 3
    if simd == "amx" and not few and (bf16 or math.prod(shape[1:]) <= MAX_PRODUCTS):
        return Packing(amx_limbs=1 if bf16 else 3)
    panel = panel_of(simd)
    if few or not transformed:
        return Packing(bf16_pairs=bf16_pairs, panel=panel)
    return Packing(4 if not bf16_pairs and side >= (6 if small else 12) else 2, bf16_pairs, panel=panel)
