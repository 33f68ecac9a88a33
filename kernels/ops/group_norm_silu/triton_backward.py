"""group_norm_silu in Triton, backward, in the tiles of the forward kernels; sums are in a fixed order.

With z the pre-activation, dz its gradient and a bar for the mean over a group:

    dx = rstd * (gamma dz - bar(gamma dz) - xhat bar(gamma dz xhat))
"""

import triton
import triton.language as tl

from ..._triton_math import column_sum
from .triton_kernels import affine, block_channels, load_tile, over_groups, program, store_tile, vector


@triton.jit
def _statistics(mean, rstd, add, sample, groups, add_n, c, valid, GROUP_SIZE: tl.constexpr):
    """For each channel the number that centres x itself, without `add`, and rstd."""
    at = sample * groups + c // GROUP_SIZE
    m = tl.load(mean + at, mask=valid, other=0.0).to(tl.float32) - vector(add, sample * add_n + c, valid, 0.0)
    return m, tl.load(rstd + at, mask=valid, other=0.0)


@triton.jit
def _xhat_and_dz(value, grad, m, r, gamma, beta, SILU: tl.constexpr):
    """grad is 0 outside of the tensor, so that dz is 0 there."""
    xhat = (value - m[None, :]) * r[None, :]
    if SILU:
        z = xhat * gamma[None, :] + beta[None, :]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        return xhat, grad * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
    else:
        return xhat, grad


@triton.jit
def _group_sums(
    s1, s2, s3, gamma, positions, valid,
    GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """From a channel's sums of dz, dz * xhat and xhat: the two means that dx takes, and the sum of dx / rstd.

    The sum of dx / rstd comes from the differences between the channel's sums and the means over its group. A
    sum of rounded dx would not cancel: for a channel that is alone in its group, the exact sum is 0.
    """
    weighted = tl.where(
        valid, gamma * s1, 0.0
    )  # rounded, like the summands of its mean: not part of a fused multiply-add
    dz_sum = over_groups(weighted, GROUPS, GROUP_SIZE, BLOCK_C) / GROUP_SIZE
    xhat_sum = over_groups(s3, GROUPS, GROUP_SIZE, BLOCK_C) / GROUP_SIZE
    m1 = dz_sum / positions
    m2 = over_groups(gamma * s2, GROUPS, GROUP_SIZE, BLOCK_C) / (1.0 * GROUP_SIZE * positions)
    return m1, m2, (weighted - dz_sum) - m2 * (s3 - xhat_sum)


@triton.jit
def backward_tile_kernel(
    grad, x, dx, sum_dz, sum_dz_xhat, sum_dx, mean, rstd, weight, bias, add, scale, shift,
    channels, positions, groups, blocks,
    g_n, g_c, g_s, x_n, x_c, x_s, d_n, d_c, d_s, add_n, scale_n, shift_n,
    SILU: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One read of grad and x, one write of dx."""
    sample, _, block = program(1, blocks)
    c, valid = block_channels(block, channels, GROUPS, GROUP_SIZE, BLOCK_C)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    mask = (s < positions)[:, None] & valid[None, :]
    value = load_tile(x, sample, x_n, s, x_s, c, x_c, mask)
    incoming = load_tile(grad, sample, g_n, s, g_s, c, g_c, mask)
    m, r = _statistics(mean, rstd, add, sample, groups, add_n, c, valid, GROUP_SIZE)
    gamma, beta = affine(weight, bias, scale, shift, sample, scale_n, shift_n, c, valid)
    xhat, dz = _xhat_and_dz(value, incoming, m, r, gamma, beta, SILU)

    s1, s2, s3 = column_sum(dz), column_sum(dz * xhat), column_sum(tl.where(mask, xhat, 0.0))
    m1, m2, total = _group_sums(s1, s2, s3, gamma, positions, valid, GROUPS, GROUP_SIZE, BLOCK_C)
    result = (dz * gamma[None, :] - m1[None, :] - xhat * m2[None, :]) * r[None, :]
    store_tile(dx, result, sample, d_n, s, d_s, c, d_c, mask)
    at = sample * channels + c
    tl.store(sum_dz + at, s1, mask=valid)
    tl.store(sum_dz_xhat + at, s2, mask=valid)
    tl.store(sum_dx + at, total * r, mask=valid)


@triton.jit
def backward_partial_kernel(
    grad, x, partial, mean, rstd, weight, bias, add, scale, shift,
    channels, positions, groups, chunk_size, chunks, blocks,
    g_n, g_c, g_s, x_n, x_c, x_s, add_n, scale_n, shift_n,
    SILU: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """partial: float32 [N, chunks, 3, C], the sums of dz, dz * xhat and xhat over each chunk."""
    sample, chunk, block = program(chunks, blocks)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < channels
    m, r = _statistics(mean, rstd, add, sample, groups, add_n, c, valid, GROUP_SIZE)
    gamma, beta = affine(weight, bias, scale, shift, sample, scale_n, shift_n, c, valid)
    s1 = tl.zeros([BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_C], tl.float32)
    s3 = tl.zeros([BLOCK_C], tl.float32)
    start = chunk * chunk_size
    for done in range(0, tl.minimum(chunk_size, positions - start), BLOCK_S):
        s = start + done + tl.arange(0, BLOCK_S)
        mask = (s < positions)[:, None] & valid[None, :]
        value = load_tile(x, sample, x_n, s, x_s, c, x_c, mask)
        incoming = load_tile(grad, sample, g_n, s, g_s, c, g_c, mask)
        xhat, dz = _xhat_and_dz(value, incoming, m, r, gamma, beta, SILU)
        s1 += column_sum(dz)
        s2 += column_sum(dz * xhat)
        s3 += column_sum(tl.where(mask, xhat, 0.0))
    at = partial + (sample * chunks + chunk) * 3 * channels + c
    tl.store(at, s1, mask=valid)
    tl.store(at + channels, s2, mask=valid)
    tl.store(at + 2 * channels, s3, mask=valid)


@triton.jit
def backward_apply_kernel(
    grad, x, dx, sum_dz, sum_dz_xhat, sum_dx, partial, mean, rstd, weight, bias, add, scale, shift,
    channels, positions, groups, chunk_size, chunks, blocks,
    g_n, g_c, g_s, x_n, x_c, x_s, d_n, d_c, d_s, add_n, scale_n, shift_n,
    SILU: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums, BLOCK_K chunks at a time, then computes dx of one chunk."""
    sample, chunk, block = program(chunks, blocks)
    c, valid = block_channels(block, channels, GROUPS, GROUP_SIZE, BLOCK_C)
    s1 = tl.zeros([BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_C], tl.float32)
    s3 = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, chunks, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        known = (k < chunks)[:, None] & valid[None, :]
        at = partial + (sample * chunks + k[:, None]) * 3 * channels + c[None, :]
        s1 += column_sum(tl.load(at, mask=known, other=0.0))
        s2 += column_sum(tl.load(at + channels, mask=known, other=0.0))
        s3 += column_sum(tl.load(at + 2 * channels, mask=known, other=0.0))
    m, r = _statistics(mean, rstd, add, sample, groups, add_n, c, valid, GROUP_SIZE)
    gamma, beta = affine(weight, bias, scale, shift, sample, scale_n, shift_n, c, valid)
    m1, m2, total = _group_sums(s1, s2, s3, gamma, positions, valid, GROUPS, GROUP_SIZE, BLOCK_C)
    at = sample * channels + c
    if chunk == 0:
        tl.store(sum_dz + at, s1, mask=valid)
        tl.store(sum_dz_xhat + at, s2, mask=valid)
        tl.store(sum_dx + at, total * r, mask=valid)

    start = chunk * chunk_size
    for done in range(0, tl.minimum(chunk_size, positions - start), BLOCK_S):
        s = start + done + tl.arange(0, BLOCK_S)
        mask = (s < positions)[:, None] & valid[None, :]
        value = load_tile(x, sample, x_n, s, x_s, c, x_c, mask)
        incoming = load_tile(grad, sample, g_n, s, g_s, c, g_c, mask)
        xhat, dz = _xhat_and_dz(value, incoming, m, r, gamma, beta, SILU)
        result = (dz * gamma[None, :] - m1[None, :] - xhat * m2[None, :]) * r[None, :]
        store_tile(dx, result, sample, d_n, s, d_s, c, d_c, mask)
