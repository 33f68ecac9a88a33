"""csrc/philox/math.h in Triton, operation for operation.

Launch with enable_fp_fusion=False: contraction would change the bits.
"""

import triton
import triton.language as tl

from ..._triton_math import fma


def floats(*literals: str) -> tl.constexpr:
    return tl.constexpr(tuple(map(float.fromhex, literals)))


# The coefficients of csrc/philox/math.h, the highest power first.
_LOG = floats("0x1.48075ap-3", "-0x1.0bdf94p-2", "0x1.0d3346p-2", "-0x1.219d8ep-2",
              "0x1.545de8p-2", "-0x1.99b40cp-2", "0x1.0002b4p-1", "-0x1.55551ep-1")  # fmt: skip
_COS = floats("0x1.d4748p-11", "-0x1.55b138p-6", "0x1.03c1aep-2", "-0x1.3bd3ccp+0")
_SIN = floats("-0x1.2ddcecp-8", "0x1.46607ep-4", "-0x1.4abbcp-1", "-0x1.777a5cp-25")
_MINUS_2_LN2 = floats("-0x1.62e4p+0", "-0x1.7f7d1cp-19")  # a part exact in products with 6 bits, and the rest
_HALF_PI = floats("0x1.921fb6p+0")
_TO_UNIT = floats("0x1p-32", "0x1p-33")
_TO_TURNS = floats("0x1p-30", "0x1p-31")
_ROUND = floats("0x1.8p23")  # added, it rounds to an integer, which the low bits of the sum hold


@triton.jit
def polynomial(x, coefficients: tl.constexpr, count: tl.constexpr):
    p = fma(x, coefficients[0], coefficients[1])
    for i in tl.static_range(2, count):
        p = fma(x, p, coefficients[i])
    return p


@triton.jit
def _radius(word):
    """sqrt(-2 ln u) as a large and a small part, for u = float32(word) 2^-32 + 2^-33."""
    bits = fma(word.to(tl.float32), _TO_UNIT[0], _TO_UNIT[1]).to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    square_tail = fma(f, f, -square)
    exponent = e.to(tl.float32)
    scaled = exponent * _MINUS_2_LN2[0]
    total = fma(f, -2.0, scaled)
    total_tail = fma(f, -2.0, scaled - total)
    log = total + square
    log_tail = (total - log) + square
    log_tail += total_tail + square_tail
    log_tail = fma(exponent, _MINUS_2_LN2[1], log_tail)
    log_tail = fma(square * f, polynomial(f, _LOG, 8), log_tail)
    x = log + log_tail
    x_tail = (log - x) + log_tail
    radius = tl.sqrt_rn(x)
    half_reciprocal = (0x7E7311C7 - radius.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return radius, (fma(-radius, radius, x) + x_tail) * half_reciprocal


@triton.jit
def _flip(x, sign):
    return (x.to(tl.uint32, bitcast=True) ^ (sign << 30)).to(tl.float32, bitcast=True)


@triton.jit
def _box_muller(w0, w1):
    radius, tail = _radius(w0)
    turns = fma(w1.to(tl.float32), _TO_TURNS[0], _TO_TURNS[1])
    shifted = turns + _ROUND[0]
    quarter = shifted.to(tl.uint32, bitcast=True)
    f = turns - (shifted - _ROUND[0])
    g = f * f
    cos_tail = polynomial(g, _COS, 4) * g
    sin = f * _HALF_PI[0]
    sin_tail = fma(f, polynomial(g, _SIN, 4), fma(f, _HALF_PI[0], -sin))
    odd = (quarter & 1) != 0
    a, a_tail = tl.where(odd, sin, 1.0), tl.where(odd, sin_tail, cos_tail)
    b, b_tail = tl.where(odd, 1.0, sin), tl.where(odd, cos_tail, sin_tail)
    x = fma(radius, a, fma(radius, a_tail, tail * (a + a_tail)))
    y = fma(radius, b, fma(radius, b_tail, tail * (b + b_tail)))
    return _flip(x, (quarter + 1) & 2), _flip(y, quarter & 2)


@triton.jit
def normals(blocks, stream, sample_id, seed):
    """The [4 * N] normals of N consecutive noise blocks: counters (block, stream, sample_id), key seed."""
    word: tl.constexpr = 0xFFFFFFFF
    w0, w1, w2, w3 = tl.philox(
        seed,
        blocks.to(tl.uint32),
        (stream & word).to(tl.uint32),
        (sample_id & word).to(tl.uint32),
        ((sample_id >> 32) & word).to(tl.uint32),
    )
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit(do_not_specialize=["seed", "stream"])
def philox_normal_kernel(
    z, sample_ids, seed: tl.int64, stream: tl.int64, elements, tiles, BLOCKS: tl.constexpr
):
    """z: float32 [B, elements]. One program for each tile of BLOCKS noise blocks of a sample."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    blocks = tile.to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    at = tile.to(tl.int64) * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    draws = normals(blocks, stream.to(tl.int64), tl.load(sample_ids + sample), seed.to(tl.int64))
    tl.store(z + sample * elements + at, draws, mask=at < elements)
