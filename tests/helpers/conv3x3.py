"""Packings and errors of the convolutions that tests compare with float64."""

import math

import torch
import torch.nn.functional as F

from diffusion.kernels import _native, conv3x3
from diffusion.kernels._tolerance import wrong
from diffusion.kernels.ops.convolution.native import multiplies_bf16_pairs
from diffusion.kernels.ops.convolution.packing import Packing

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Every packing that this processor can multiply; others are left out, as there is nothing to run them on.
PACKINGS = [Packing(0), Packing(2), Packing(4)]
PACKINGS += [Packing(0, panel=16), Packing(2, panel=16), Packing(4, panel=16)]
PACKINGS += [Packing(0, bf16_pairs=True), Packing(2, bf16_pairs=True)] if multiplies_bf16_pairs() else []
PACKINGS += [Packing(amx_limbs=1), Packing(amx_limbs=3)] if "amx" in _native.simd_variants() else []
EXACT = [packing for packing in PACKINGS if not packing.bf16_pairs and packing.amx_limbs != 1]


def as_double(value):
    return value.double() if isinstance(value, torch.Tensor) else value


def expected_of(args, options):
    return conv3x3(
        *map(as_double, args), **{name: as_double(v) for name, v in options.items()}, backend="reference"
    )


def complaint(actual, args, options, packed) -> str | None:
    """The reason why `actual` exceeds the error bound, with the algorithm's documented extra error."""
    peer = conv3x3(*args, **options, backend="reference")
    return wrong(actual, peer, expected_of(args, options), accuracy=packed.accuracy)


def bounded(map, x, silu=False):
    """An affine map, with bounds of its values for x."""
    centre, gain, offset = (m.double()[:, :, None, None] for m in map)
    z = (x.double() - centre) * gain + offset
    z = F.silu(-math.log(2) * z) if silu else z
    return torch.cat([map, 1.001 * z.abs().amax((2, 3)).float()[None]])


def runnable(simd, packings=PACKINGS):
    """The packings that an instruction set multiplies."""
    pairs = simd in ("avx512_bf16", "amx")
    return [p for p in packings if (not p.amx_limbs or simd == "amx") and (not p.bf16_pairs or pairs)]
