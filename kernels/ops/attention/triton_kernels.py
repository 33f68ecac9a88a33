"""attention in Triton: the online softmax of FlashAttention (Dao et al. 2022, algorithm 1) in small tiles.

Weights are powers of e. With powers of 2, a large score would be rounded once more than the logsumexp, and
the error would reach every weight of its row. Tensors are read through their strides (batch, head, position),
with a contiguous last dimension of WIDTH, padded to BLOCK_D. EVEN: every tile lies within the positions.
PRECISION: of float32 products, "ieee" or "tf32".
"""

import triton
import triton.language as tl

from ..._triton_math import cast, dot

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _program(tiles, heads):
    """(batch, head, tile); the tiles of a head are neighbours, so that they share keys in the cache."""
    index = tl.program_id(0)
    head = index // tiles
    return (head // heads).to(tl.int64), (head % heads).to(tl.int64), index % tiles


@triton.jit
def _load(pointer, rows, stride_s, positions, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, EVEN: tl.constexpr):
    """Rows [len(rows), BLOCK_D]; zeros outside of the tensor."""
    d = tl.arange(0, BLOCK_D)
    at = pointer + rows[:, None].to(tl.int64) * stride_s + d[None, :]
    if EVEN and WIDTH == BLOCK_D:
        return tl.load(at)
    elif WIDTH == BLOCK_D:
        return tl.load(at, mask=(rows < positions)[:, None], other=0.0)
    else:
        return tl.load(at, mask=(rows < positions)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(pointer, value, rows, stride_s, positions, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = pointer + rows[:, None].to(tl.int64) * stride_s + d[None, :]
    tl.store(
        at, cast(value, pointer.dtype.element_ty), mask=(rows < positions)[:, None] & (d < WIDTH)[None, :]
    )


@triton.jit
def forward_kernel(
    q, k, v, out, logsumexp, scale, heads, positions, tiles,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program for each BLOCK_M queries, over all keys in steps of BLOCK_N."""
    batch, head, tile = _program(tiles, heads)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = _load(q + batch * q_b + head * q_h, m, q_s, positions, WIDTH, BLOCK_D, EVEN)
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, positions, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = _load(k, n, k_s, positions, WIDTH, BLOCK_D, EVEN)
        scores = dot(queries, tl.trans(keys), None, PRECISION) * scale
        if not EVEN:
            scores = tl.where((n < positions)[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = _exp(scores - higher[:, None])
        rescale = _exp(highest - higher)
        total = total * rescale + tl.sum(weights, 1)
        values = _load(v, n, v_s, positions, WIDTH, BLOCK_D, EVEN)
        result = dot(cast(weights, values.dtype), values, result * rescale[:, None], PRECISION)
        highest = higher
    result = result / total[:, None]
    _store(out + batch * o_b + head * o_h, result, m, o_s, positions, WIDTH, BLOCK_D)
    at = (batch * heads + head) * positions + m
    tl.store(logsumexp + at, highest + tl.log(total), mask=m < positions)


@triton.jit
def delta_kernel(
    out, grad, delta, heads, positions, tiles, o_b, o_h, o_s, g_b, g_h, g_s,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """delta: float32 [B, H, S], the sum over the width of out * grad."""
    batch, head, tile = _program(tiles, heads)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o = _load(out + batch * o_b + head * o_h, m, o_s, positions, WIDTH, BLOCK_D, EVEN).to(tl.float32)
    g = _load(grad + batch * g_b + head * g_h, m, g_s, positions, WIDTH, BLOCK_D, EVEN).to(tl.float32)
    at = (batch * heads + head) * positions + m
    tl.store(delta + at, tl.sum(o * g, 1), mask=m < positions)


@triton.jit
def _rows(pointer, m, positions, missing: tl.constexpr, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointer + m)
    else:
        return tl.load(pointer + m, mask=m < positions, other=missing)


@triton.jit
def backward_queries_kernel(
    grad, q, k, v, dq, logsumexp, delta, scale, heads, positions, tiles,
    g_b, g_h, g_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, d_b, d_h, d_s,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq for BLOCK_M queries, over all keys."""
    batch, head, tile = _program(tiles, heads)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    queries = _load(q + batch * q_b + head * q_h, m, q_s, positions, WIDTH, BLOCK_D, EVEN)
    grads = _load(grad + batch * g_b + head * g_h, m, g_s, positions, WIDTH, BLOCK_D, EVEN)
    rows = (batch * heads + head) * positions
    log_sum = _rows(logsumexp + rows, m, positions, 0.0, EVEN)
    deltas = _rows(delta + rows, m, positions, 0.0, EVEN)
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, positions, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        keys = _load(k, n, k_s, positions, WIDTH, BLOCK_D, EVEN)
        values = _load(v, n, v_s, positions, WIDTH, BLOCK_D, EVEN)
        scores = dot(queries, tl.trans(keys), None, PRECISION) * scale
        weights = _exp(scores - log_sum[:, None])
        if not EVEN:
            weights = tl.where((n < positions)[None, :], weights, 0.0)
        dweights = dot(grads, tl.trans(values), None, PRECISION)
        dscores = weights * (dweights - deltas[:, None])
        result = dot(cast(dscores, keys.dtype), keys, result, PRECISION)
    _store(dq + batch * d_b + head * d_h, result * scale, m, d_s, positions, WIDTH, BLOCK_D)


@triton.jit
def backward_keys_kernel(
    grad, q, k, v, dk, dv, logsumexp, delta, scale, heads, positions, tiles,
    g_b, g_h, g_s, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, d_b, d_h, d_s,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv for BLOCK_N keys, over all queries; scores are transposed, [BLOCK_N, BLOCK_M]."""
    batch, head, tile = _program(tiles, heads)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    keys = _load(k + batch * k_b + head * k_h, n, k_s, positions, WIDTH, BLOCK_D, EVEN)
    values = _load(v + batch * v_b + head * v_h, n, v_s, positions, WIDTH, BLOCK_D, EVEN)
    rows = (batch * heads + head) * positions
    q += batch * q_b + head * q_h
    grad += batch * g_b + head * g_h
    dkeys = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dvalues = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, positions, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        queries = _load(q, m, q_s, positions, WIDTH, BLOCK_D, EVEN)
        grads = _load(grad, m, g_s, positions, WIDTH, BLOCK_D, EVEN)
        log_sum = _rows(logsumexp + rows, m, positions, float("inf"), EVEN)
        deltas = _rows(delta + rows, m, positions, 0.0, EVEN)
        scores = dot(keys, tl.trans(queries), None, PRECISION) * scale
        weights = _exp(scores - log_sum[None, :])  # 0 for queries outside
        dvalues = dot(cast(weights, grads.dtype), grads, dvalues, PRECISION)
        dweights = dot(values, tl.trans(grads), None, PRECISION)
        dscores = weights * (dweights - deltas[None, :])
        dkeys = dot(cast(dscores, queries.dtype), queries, dkeys, PRECISION)
    _store(dk + batch * d_b + head * d_h, dkeys * scale, n, d_s, positions, WIDTH, BLOCK_D)
    _store(dv + batch * d_b + head * d_h, dvalues, n, d_s, positions, WIDTH, BLOCK_D)
