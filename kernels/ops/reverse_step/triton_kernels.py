"""csrc/reverse_step/math.h and the kernel of reverse_step.cu in Triton, operation for operation."""

import triton
import triton.language as tl

from ..._triton_math import cast, fma
from ..philox.triton_kernels import floats, normals, polynomial
from .coefficients import ROW_LENGTH, StepCoefficients

# exp(x) = 2^n exp(r): log2(e), ln2 in two parts, and the polynomial of csrc/reverse_step/math.h.
_LOG2_E = floats("0x1.715476p+0")
_LN2 = floats("0x1.62e4p-1", "0x1.7f7d1cp-20")
_ROUND = floats("0x1.8p23")
_EXP = floats("0x1.6a4f52p-10", "0x1.12397ep-7", "0x1.5558aep-5", "0x1.555492p-3", "0x1.fffffcp-2")


@triton.jit
def _power_of_two(n):
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exponential(x):
    """exp(x) to 1 ulp; overflows to infinity and underflows to 0."""
    x = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))
    shifted = x * _LOG2_E[0] + _ROUND[0]
    n = shifted - _ROUND[0]
    r = fma(n, -_LN2[1], fma(n, -_LN2[0], x))
    y = fma(r * r, polynomial(r, _EXP, 5), r) + 1.0
    exponent = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = exponent >> 1
    return y * _power_of_two(half) * _power_of_two(exponent - half)


# Columns of a step table.
_ROW_LENGTH = tl.constexpr(ROW_LENGTH)
_GUIDANCE_SCALE = tl.constexpr(StepCoefficients._fields.index("guidance_scale"))
_X0_FROM_X = tl.constexpr(StepCoefficients._fields.index("x0_from_x"))
_X0_FROM_OUTPUT = tl.constexpr(StepCoefficients._fields.index("x0_from_output"))
_CLIP_X0 = tl.constexpr(StepCoefficients._fields.index("clip_x0"))
_COEF_X = tl.constexpr(StepCoefficients._fields.index("coef_x"))
_COEF_X0 = tl.constexpr(StepCoefficients._fields.index("coef_x0"))
_COEF_X0_PREV = tl.constexpr(StepCoefficients._fields.index("coef_x0_prev"))
_COEF_OUTPUT = tl.constexpr(StepCoefficients._fields.index("coef_output"))
_SIGMA = tl.constexpr(StepCoefficients._fields.index("sigma"))
_LOG_VAR_MIN = tl.constexpr(StepCoefficients._fields.index("log_var_min"))
_LOG_VAR_MAX = tl.constexpr(StepCoefficients._fields.index("log_var_max"))


@triton.jit
def _entry(table, step, inside, column: tl.constexpr):
    """One number of the row; a step outside of the table cannot raise on a device, so it gives NaN."""
    return tl.load(table + step * _ROW_LENGTH + column, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _offsets(sample, within, positions, stride_n, stride_c, stride_p, LINEAR: tl.constexpr):
    """Offsets of a sample's elements in a tensor with these strides. LINEAR: the sample is contiguous."""
    if LINEAR:
        return sample * stride_n + within
    else:
        return sample * stride_n + within // positions * stride_c + within % positions * stride_p


@triton.jit
def reverse_step_kernel(
    x, cond, uncond, x0_prev, noise, table, counter, sample_ids, x_next, x0, unet_input,
    batch, elements, positions, tiles, rows, out_n, out_c, out_p, in_n, in_c, in_p,
    LEARNED: tl.constexpr, OUT_LINEAR: tl.constexpr, IN_LINEAR: tl.constexpr, COPIES: tl.constexpr,
    ADVANCE: tl.constexpr, LARGE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program for each tile of BLOCKS noise blocks of a sample; most tensors may be None.

    The row and the seed come from device memory, so that one captured graph serves every step and image.
    x_next may be x, and x0 be x0_prev. LARGE: a sample has more elements than int32 counts. ADVANCE: the last
    program to finish sends the counter on to the next step.
    """
    step = tl.load(counter, volatile=True)
    seed = tl.load(counter + 1)
    stream = tl.load(counter + 2) + step
    inside = (step >= 0) & (step < rows)
    guidance_scale = _entry(table, step, inside, _GUIDANCE_SCALE)
    x0_from_x = _entry(table, step, inside, _X0_FROM_X)
    x0_from_output = _entry(table, step, inside, _X0_FROM_OUTPUT)
    clip = _entry(table, step, inside, _CLIP_X0)
    coef_x = _entry(table, step, inside, _COEF_X)
    coef_x0 = _entry(table, step, inside, _COEF_X0)
    coef_x0_prev = _entry(table, step, inside, _COEF_X0_PREV)
    coef_output = _entry(table, step, inside, _COEF_OUTPUT)
    sigma = _entry(table, step, inside, _SIGMA)

    sample = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if LARGE:
        tile = tile.to(tl.int64)
    within = tile * (4 * BLOCKS) + tl.arange(0, 4 * BLOCKS)
    mask = within < elements
    at = sample * elements + within
    out_at = _offsets(sample, within, positions, out_n, out_c, out_p, OUT_LINEAR)

    x_t = tl.load(x + at, mask=mask)
    out = tl.load(cond + out_at, mask=mask).to(tl.float32)
    if uncond is not None:
        unguided = tl.load(uncond + out_at, mask=mask).to(tl.float32)
        out = unguided + guidance_scale * (out - unguided)
    clean = x0_from_x * x_t + x0_from_output * out
    clean = tl.where(clean < -clip, -clip, tl.where(clean > clip, clip, clean))
    value = coef_x * x_t + coef_x0 * clean + coef_output * out
    if coef_x0_prev != 0.0:
        if x0_prev is not None:
            value += coef_x0_prev * tl.load(x0_prev + at, mask=mask)
        else:
            value += float("nan")
    if sigma != 0.0:
        if noise is not None:
            z = tl.load(noise + at, mask=mask)
        else:
            blocks = tile * BLOCKS + tl.arange(0, BLOCKS)
            z = normals(blocks, stream, tl.load(sample_ids + sample), seed)
        if LEARNED:
            log_var_min = _entry(table, step, inside, _LOG_VAR_MIN)
            log_var_max = _entry(table, step, inside, _LOG_VAR_MAX)
            variance_at = _offsets(sample, within + elements, positions, out_n, out_c, out_p, OUT_LINEAR)
            v = tl.load(cond + variance_at, mask=mask).to(tl.float32)
            fraction = (v + 1.0) * 0.5
            log_variance = fraction * log_var_max + (1.0 - fraction) * log_var_min
            value += sigma * _exponential(0.5 * log_variance) * z
        else:
            value += sigma * z
    tl.store(x_next + at, value, mask=mask)
    if x0 is not None:
        tl.store(x0 + at, clean, mask=mask)
    if unet_input is not None:
        for copy in tl.static_range(COPIES):
            image = sample + copy * batch
            in_at = _offsets(image, within, positions, in_n, in_c, in_p, IN_LINEAR)
            tl.store(unet_input + in_at, cast(value, unet_input.dtype.element_ty), mask=mask)
    if ADVANCE:
        tl.debug_barrier()  # every thread has read the counter
        if tl.atomic_add(counter + 3, 1) == tl.num_programs(0) - 1:
            tl.store(counter + 3, 0)
            tl.store(counter, step + 1)
