"""group_norm_silu in Triton, forward: one kernel where a tile holds whole groups, else two over chunks.

A tile is [BLOCK_S positions, BLOCK_C channels] in either layout; its channels are GROUPS whole groups of
GROUP_SIZE, and all arithmetic is in float32. weight, bias, add, scale and shift may be None.
"""

import triton
import triton.language as tl

from ..._triton_math import cast, column_sum


@triton.jit
def program(chunks, blocks):
    """(sample, chunk of positions, block of channels); neighbours share the cache lines of channels_last."""
    index = tl.program_id(0).to(tl.int64)
    return index // blocks // chunks, index // blocks % chunks, index % blocks


@triton.jit
def block_channels(block, channels, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channel numbers [BLOCK_C], and a mask of those that belong to this block."""
    local = tl.arange(0, BLOCK_C)
    c = block * (GROUPS * GROUP_SIZE) + local
    return c, (local < GROUPS * GROUP_SIZE) & (c < channels)


@triton.jit
def over_groups(values, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr, BLOCK_C: tl.constexpr):
    """For each channel [BLOCK_C], the sum of `values` over the channels of its group."""
    if GROUPS == 1:
        return tl.sum(values, 0) + tl.zeros([BLOCK_C], tl.float32)
    else:
        group = tl.arange(0, BLOCK_C) // GROUP_SIZE
        return tl.sum(tl.where(group[:, None] == group[None, :], values[None, :], 0.0), 1)


@triton.jit
def vector(pointer, offsets, mask, missing: tl.constexpr):
    if pointer is None:
        return tl.full(offsets.shape, missing, tl.float32)
    else:
        return tl.load(pointer + offsets, mask=mask, other=missing).to(tl.float32)


@triton.jit
def affine(weight, bias, scale, shift, sample, scale_n, shift_n, c, valid):
    """The per-channel gamma and beta of z = xhat * gamma + beta."""
    factor = 1.0 + vector(scale, sample * scale_n + c, valid, 0.0)
    beta = vector(bias, c, valid, 0.0) * factor + vector(shift, sample * shift_n + c, valid, 0.0)
    return vector(weight, c, valid, 1.0) * factor, beta


@triton.jit
def load_tile(pointer, sample, stride_n, positions, stride_s, c, stride_c, mask):
    at = sample * stride_n + positions[:, None] * stride_s + c[None, :] * stride_c
    return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, value, sample, stride_n, positions, stride_s, c, stride_c, mask):
    at = sample * stride_n + positions[:, None] * stride_s + c[None, :] * stride_c
    tl.store(pointer + at, cast(value, pointer.dtype.element_ty), mask=mask)


@triton.jit
def _store_activated(y, centred, gamma, beta, sample, y_n, positions, y_s, c, y_c, mask, SILU: tl.constexpr):
    z = centred * gamma[None, :] + beta[None, :]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    store_tile(y, z, sample, y_n, positions, y_s, c, y_c, mask)


@triton.jit
def _store_statistics(mean, rstd, m, r, sample, groups, c, valid, GROUP_SIZE: tl.constexpr):
    at = sample * groups + c // GROUP_SIZE
    first = valid & (c % GROUP_SIZE == 0)
    tl.store(mean + at, m, mask=first)
    tl.store(rstd + at, r, mask=first)


@triton.jit
def _reciprocal_root(variance):
    return tl.div_rn(1.0, tl.sqrt_rn(variance))


@triton.jit
def forward_tile_kernel(
    x, y, mean, rstd, weight, bias, add, scale, shift,
    eps, channels, positions, groups, blocks,
    x_n, x_c, x_s, y_n, y_c, y_s, add_n, scale_n, shift_n,
    SILU: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One read and one write: the tile stays in registers between the statistics and the output."""
    sample, _, block = program(1, blocks)
    c, valid = block_channels(block, channels, GROUPS, GROUP_SIZE, BLOCK_C)
    s = tl.arange(0, BLOCK_S).to(tl.int64)
    mask = (s < positions)[:, None] & valid[None, :]
    value = load_tile(x, sample, x_n, s, x_s, c, x_c, mask)
    if add is not None:
        value += vector(add, sample * add_n + c, valid, 0.0)[None, :]
        value = tl.where(mask, value, 0.0)
    count = 1.0 * GROUP_SIZE * positions
    m = over_groups(column_sum(value), GROUPS, GROUP_SIZE, BLOCK_C) / count
    centred = value - m[None, :]  # unmasked: to mask only the sums takes fewer registers
    sums = column_sum(tl.where(mask, centred, 0.0))
    residue = over_groups(sums, GROUPS, GROUP_SIZE, BLOCK_C) / count  # the rounding error of m
    centred -= residue[None, :]
    m += residue
    squares = column_sum(tl.where(mask, centred * centred, 0.0))
    squares = over_groups(squares, GROUPS, GROUP_SIZE, BLOCK_C)
    r = _reciprocal_root(squares / count + eps)
    _store_statistics(mean, rstd, m, r, sample, groups, c, valid, GROUP_SIZE)
    gamma, beta = affine(weight, bias, scale, shift, sample, scale_n, shift_n, c, valid)
    _store_activated(y, centred, gamma * r, beta, sample, y_n, s, y_s, c, y_c, mask, SILU)


@triton.jit
def _first_position(x, sample, x_n, c, x_c, valid):
    """A value of each channel [BLOCK_C], close enough to its mean for differences to be exact."""
    return tl.load(x + sample * x_n + c * x_c, mask=valid, other=0.0).to(tl.float32)


@triton.jit
def forward_partial_kernel(
    x, partial, channels, positions, chunk_size, chunks, blocks, x_n, x_c, x_s,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """partial: float32 [N, chunks, 2, C]: for each channel the mean, less the value at the first position,
    and the sum of squares about the mean.

    The tiles of a chunk are merged as in Chan, Golub & LeVeque 1983, equation 2.1.
    """
    sample, chunk, block = program(chunks, blocks)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    valid = c < channels
    origin = _first_position(x, sample, x_n, c, x_c, valid)
    mean = tl.zeros([BLOCK_C], tl.float32)
    squares = tl.zeros([BLOCK_C], tl.float32)
    start = chunk * chunk_size
    for done in range(0, tl.minimum(chunk_size, positions - start), BLOCK_S):
        s = start + done + tl.arange(0, BLOCK_S)
        mask = (s < positions)[:, None] & valid[None, :]
        value = load_tile(x, sample, x_n, s, x_s, c, x_c, mask) - origin[None, :]
        size = tl.minimum(positions - start - done, BLOCK_S).to(tl.float32)
        tile_mean = column_sum(tl.where(mask, value, 0.0)) / size
        centred = tl.where(mask, value - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = size / (done + size)
        mean += delta * share
        squares += column_sum(centred * centred) + delta * delta * (done * share)
    at = partial + (sample * chunks + chunk) * 2 * channels + c
    tl.store(at, mean, mask=valid)
    tl.store(at + channels, squares, mask=valid)


@triton.jit
def forward_apply_kernel(
    x, y, partial, mean, rstd, weight, bias, add, scale, shift,
    eps, channels, positions, groups, chunk_size, chunks, blocks,
    x_n, x_c, x_s, y_n, y_c, y_s, add_n, scale_n, shift_n,
    SILU: tl.constexpr, GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Merges the partial statistics, BLOCK_K chunks at a time, then normalises one chunk.

    Means are kept as differences, which are accurate far from zero: a channel's mean from its value at the
    first position, a group's mean from the mean of its first channel.
    """
    sample, chunk, block = program(chunks, blocks)
    c, valid = block_channels(block, channels, GROUPS, GROUP_SIZE, BLOCK_C)
    origin = _first_position(x, sample, x_n, c, x_c, valid)
    shifted = origin + vector(add, sample * add_n + c, valid, 0.0)
    reference = over_groups(tl.where(c % GROUP_SIZE == 0, shifted, 0.0), GROUPS, GROUP_SIZE, BLOCK_C)
    offset = tl.where(valid, shifted - reference, 0.0)
    from_sample = partial + sample * chunks * 2 * channels
    total = offset * positions
    squares = tl.zeros([BLOCK_C], tl.float32)
    count = 1.0 * GROUP_SIZE * positions
    for first in range(0, chunks, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        known = (k < chunks)[:, None] & valid[None, :]
        size = tl.minimum(positions - k * chunk_size, chunk_size).to(tl.float32)
        means = tl.load(from_sample + k[:, None] * 2 * channels + c[None, :], mask=known, other=0.0)
        total += column_sum(means * size[:, None])
    group_mean = over_groups(total, GROUPS, GROUP_SIZE, BLOCK_C) / count
    centre = group_mean - offset
    for first in range(0, chunks, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        known = (k < chunks)[:, None] & valid[None, :]
        size = tl.minimum(positions - k * chunk_size, chunk_size).to(tl.float32)
        at = from_sample + k[:, None] * 2 * channels + c[None, :]
        delta = tl.load(at, mask=known, other=0.0) - centre[None, :]
        within = tl.load(at + channels, mask=known, other=0.0)
        squares += column_sum(tl.where(known, within + delta * delta * size[:, None], 0.0))
    r = _reciprocal_root(over_groups(squares, GROUPS, GROUP_SIZE, BLOCK_C) / count + eps)
    if chunk == 0:
        _store_statistics(mean, rstd, reference + group_mean, r, sample, groups, c, valid, GROUP_SIZE)

    gamma, beta = affine(weight, bias, scale, shift, sample, scale_n, shift_n, c, valid)
    start = chunk * chunk_size
    for done in range(0, tl.minimum(chunk_size, positions - start), BLOCK_S):
        s = start + done + tl.arange(0, BLOCK_S)
        mask = (s < positions)[:, None] & valid[None, :]
        value = load_tile(x, sample, x_n, s, x_s, c, x_c, mask)
        centred = (value - origin[None, :]) - centre[None, :]
        _store_activated(y, centred, gamma * r, beta, sample, y_n, s, y_s, c, y_c, mask, SILU)
