"""Operations that Triton's interpreter rounds otherwise than a GPU, made to round as on the device."""

import triton
import triton.language as tl

from ._triton import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def fma(x, y, z):
    """x * y + z rounded once; x is a float32 tensor. Interpreters before Triton 3.9 round tl.fma twice."""
    if _INTERPRETED:
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def dot(a, b, sum, PRECISION: tl.constexpr):
    """sum + a b in float32; sum may be None. The interpreter takes the bits of bfloat16 for integers."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="ieee")
    else:
        return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def cast(value, dtype: tl.constexpr):
    """float32 rounded to nearest, ties to even. The interpreter would cut bfloat16 off."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nan = (bits & 0x7FFFFFFF) > 0x7F800000
        return tl.where(nan, (bits >> 16) | 0x40, rounded).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(dtype)


@triton.jit
def column_sum(values):
    """[R, C] -> [C], R a power of two, in a tree. The interpreter would add row after row."""
    if _INTERPRETED:
        while values.shape[0] > 1:
            values = tl.sum(tl.reshape(values, [2, values.shape[0] // 2, values.shape[1]]), 0)
        return tl.reshape(values, [values.shape[1]])
    else:
        return tl.sum(values, 0)
