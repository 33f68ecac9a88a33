"""The weights of a convolution in the order in which csrc/convolution_cpu.h reads them, transformed once.

Winograd's algorithm F(m x m, 3 x 3) makes m x m outputs out of (m + 2)^2 products for each pair of channels,
instead of 9 m^2 (Lavin & Gray 2016, arXiv:1509.09308): 2.25 times fewer for m = 2 and 4 times fewer for m =
4, whose transforms, by the points 0, 1, -1, 2, -2 and infinity, cost a digit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PANEL = 64  # csrc/convolution.h
LANES = 16
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


@dataclass(frozen=True)
class PackedWeight:
    """A convolution's weight [K, C, 3, 3] or [K, C, 1, 1], ready for the C++ backend; see `pack`.

    weight: as it was. data: float32, or bfloat16 where pairs of it are multiplied. tile: m of Winograd's
    algorithm, 0 for none.
    """

    weight: Tensor
    data: Tensor
    tile: int

    @property
    def accuracy(self) -> float:
        """What the algorithm may lose, as a share of the largest output, beyond what every kernel may."""
        if self.data.dtype == torch.bfloat16:
            return {0: 6e-3, 2: 1e-2, 4: 0.2}[self.tile]
        return {0: 0.0, 2: 0.0, 4: 2e-5}[self.tile]

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape


def _factors(weight: Tensor, tile: int) -> Tensor:
    """float64 [frequencies or taps, C, K]."""
    if not tile:
        return weight.permute(2, 3, 1, 0).flatten(0, 1)
    transform = torch.tensor(_TRANSFORMS[tile], dtype=torch.float64)
    return torch.einsum("ia,kcab,jb->ijck", transform, weight, transform).flatten(0, 1)


def pack(weight: Tensor, *, tile: int, pairs: bool) -> PackedWeight:
    """Packs a weight [K, C, 3, 3], or [K, C, 1, 1] with tile 0.

    tile: 2 or 4 for Winograd's algorithm, 0 for the direct one. pairs: round to bfloat16, for processors that
    multiply pairs of it. The transform is in float64 and rounds once.
    """
    k, c, height, width = weight.shape
    if height != width or height not in (1, 3) or tile not in (0, 2, 4) or (tile and height != 3):
        raise ValueError(f"a weight {list(weight.shape)} cannot be packed for tiles of {tile}")
    pack = 2 if pairs else 1
    dtype = torch.bfloat16 if pairs else torch.float32
    rows, columns = -(-c // pack) * pack, -(-k // LANES) * LANES
    panels = []
    for panel in weight.detach().cpu().split(PANEL):  # a panel at a time: float64 is large
        factors = _factors(panel.double(), tile)
        padded = factors.new_zeros(len(factors), rows, min(PANEL, columns - PANEL * len(panels)))
        padded[:, :c, : factors.shape[2]] = factors
        words = padded.to(dtype).unflatten(1, (-1, pack)).transpose(2, 3)  # [F, rows / pack, K, pack]
        panels.append(words.flatten(1) if tile else words.reshape(1, -1))
    return PackedWeight(weight.detach(), torch.cat(panels, 1), tile)


def choose_tile(shape: Sequence[int], height: int, width: int, pairs: bool) -> int:
    """The tile with which a convolution by a weight [K, C, 3, 3] to a map of this size takes the least time.

    By benchmarks/test_ops.py. It does not depend on the batch, so that an image does not either. Where a map
    is small and the weight is not, the weight is most of what is read, and it grows with the tile; the
    transforms of few channels cost more than they save. Rounded to bfloat16, F(4 x 4, 3 x 3) would lose too
    much: up to a tenth of the largest output.
    """
    least = min(height, width)
    if least < 3 or shape[1] < 8:
        return 0
    small = shape[0] * shape[1] <= SMALL_WEIGHT
    return 4 if not pairs and least >= (6 if small else 12) else 2
