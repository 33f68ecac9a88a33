"""attention in Triton: fused_diffusion::attention_triton and its backward, and their tilings."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _triton
from .arguments import Arguments
from .library import empty_like_heads, operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 256
MIN_PROGRAMS = 128  # fewer programs leave a large GPU idle


class Tiling(NamedTuple):
    """How a kernel divides its work, and the resources of a program.

    rows: queries of a program, or keys where it computes their gradient. step: rows of the other tensors that
    an iteration of its loop reads.
    """

    rows: int
    step: int
    warps: int
    stages: int


# By direction, size of an element in bytes and padded width; from few rows to many, as far as registers and
# the 163 KB of shared memory of sm_80 go. Products of float32 are sums of fused multiply-adds: small tiles.
_TILINGS = {
    "forward": {
        (2, 64): (Tiling(16, 64, 4, 3), Tiling(64, 64, 4, 2), Tiling(128, 64, 8, 2)),
        (2, 128): (Tiling(16, 64, 4, 2), Tiling(64, 32, 4, 2), Tiling(128, 64, 8, 2)),
        (2, 256): (Tiling(16, 64, 8, 2), Tiling(32, 64, 4, 2), Tiling(64, 64, 8, 2)),
        (4, 64): (Tiling(16, 32, 8, 2), Tiling(32, 32, 8, 2)),
        (4, 128): (Tiling(16, 32, 8, 2), Tiling(32, 32, 8, 2)),
        (4, 256): (Tiling(16, 16, 8, 1), Tiling(32, 16, 8, 1)),
    },
    "backward": {
        (2, 64): (Tiling(16, 64, 4, 2), Tiling(64, 64, 4, 2)),
        (2, 128): (Tiling(16, 32, 4, 2), Tiling(64, 32, 8, 2)),
        (2, 256): (Tiling(16, 32, 4, 1), Tiling(32, 32, 8, 1)),
        (4, 64): (Tiling(32, 32, 8, 1),),
        (4, 128): (Tiling(16, 32, 8, 1),),
        (4, 256): (Tiling(16, 16, 8, 1),),
    },
}


def padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def tilings(dtype: torch.dtype, width: int, heads: int, positions: int, direction: str) -> list[Tiling]:
    """The few tilings worth measuring: the largest that fills the chip, then its neighbours.

    heads: their number in the whole batch.
    """
    candidates = _TILINGS[direction][dtype.itemsize, max(64, padded(width))]
    filling = [i for i, t in enumerate(candidates) if heads * math.ceil(positions / t.rows) >= MIN_PROGRAMS]
    best = max(filling, default=0)
    return [candidates[i] for i in (best, best - 1, best + 1) if 0 <= i < len(candidates)]


def _precision(dtype: torch.dtype) -> str:
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and torch.version.hip is None
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def _strides(*tensors: Tensor) -> list[int]:
    """The strides of batch, head and position, for each tensor."""
    return [stride for t in tensors for stride in t.stride()[:3]]


def _even(tiling: Tiling, positions: int) -> bool:
    return positions % math.lcm(tiling.rows, tiling.step) == 0


def _fastest(direction: str, q: Tensor, launch: Callable[..., None]) -> None:
    batch, heads, positions, width = q.shape
    precision = _precision(q.dtype)
    candidates = tilings(q.dtype, width, batch * heads, positions, direction)
    problem = (*q.shape, q.stride(), q.dtype, precision)
    constants = {"WIDTH": width, "BLOCK_D": padded(width), "PRECISION": precision, "enable_fp_fusion": True}

    def launch_tiling(tiling: Tiling) -> None:
        tiles = math.ceil(positions / tiling.rows)
        options = {"num_warps": tiling.warps, "num_stages": tiling.stages, "EVEN": _even(tiling, positions)}
        launch(tiling, (batch * heads * tiles,), (heads, positions, tiles), {**constants, **options})

    with torch.cuda.device_of(q):
        launch_tiling(_triton.fastest(f"attention {direction}", problem, candidates, launch_tiling, q.device))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    from .triton_kernels import forward_kernel

    out, logsumexp = empty_like_heads(q), q.new_empty(q.shape[:3], dtype=torch.float32)

    def launch(tiling: Tiling, grid: tuple[int], sizes: tuple[int, ...], options: dict[str, Any]) -> None:
        forward_kernel[grid](
            q, k, v, out, logsumexp, scale, *sizes, *_strides(q, k, v, out),
            BLOCK_M=tiling.rows, BLOCK_N=tiling.step, **options,
        )  # fmt: skip

    if q.numel() > 0:
        _fastest("forward", q, launch)
    return out, logsumexp


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import backward_keys_kernel, backward_queries_kernel, delta_kernel

    dq, dk, dv = empty_like_heads(q), empty_like_heads(q), empty_like_heads(q)
    if q.shape[2] == 1:  # the softmax of one score is the constant 1
        return dq.zero_(), dk.zero_(), dv.copy_(grad)
    delta = torch.empty_like(logsumexp)
    strides = _strides(grad, q, k, v, dq)

    def launch(tiling: Tiling, grid: tuple[int], sizes: tuple[int, ...], options: dict[str, Any]) -> None:
        shape = {name: options[name] for name in ("WIDTH", "BLOCK_D", "EVEN", "num_warps")}
        delta_kernel[grid](out, grad, delta, *sizes, *_strides(out, grad), BLOCK_M=tiling.rows, **shape)
        numbers = (logsumexp, delta, scale, *sizes, *strides)
        backward_queries_kernel[grid](
            grad, q, k, v, dq, *numbers, BLOCK_M=tiling.rows, BLOCK_N=tiling.step, **options
        )
        backward_keys_kernel[grid](
            grad, q, k, v, dk, dv, *numbers, BLOCK_M=tiling.step, BLOCK_N=tiling.rows, **options
        )

    if q.numel() > 0:
        _fastest("backward", q, launch)
    return dq, dk, dv


operator.register("attention_triton", _forward, _backward)


def supports(arguments: Arguments) -> str | None:
    q, k, v, _ = arguments
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, not float32, bfloat16 or float16"
    if q.shape[-1] > MAX_WIDTH:
        return f"the width of a head is {q.shape[-1]}, more than {MAX_WIDTH}"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"the last dimension of {name} is not contiguous"
    return _triton.unsupported(q.device)


def attention(arguments: Arguments) -> Tensor:
    q, k, v, _ = arguments
    return torch.ops.fused_diffusion.attention_triton(q, k, v, arguments.scale_or_default())[0]
