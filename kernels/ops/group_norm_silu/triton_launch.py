"""group_norm_silu in Triton: fused_diffusion::group_norm_silu_triton and its backward, and their tilings."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _triton
from .arguments import Arguments
from .library import empty_like_x, operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_GROUP_SIZE = 4096  # channels of a group, so that a tile has at least 4 of its positions
# Elements of the largest tile, a power of two, that the registers of a program hold.
MAX_TILE = {"forward": 32768, "backward": 16384}
PER_THREAD = {"forward": (32, 16, 64), "backward": (32, 16)}  # elements of a tile, the preferred number first
SPLIT_TILE = 4096  # elements of a tile of the two kernels with a split reduction
MAX_CHUNKS = 64
PARTIAL_TILE = 2048  # partial statistics that are merged at a time
MIN_PROGRAMS = 256  # fewer programs leave a large GPU idle


class Tiling(NamedTuple):
    """A program's tile is [block_s, block_c] and holds `groups` whole groups.

    chunk: positions of a program of the two kernels with a split reduction; 0 for the one kernel, whose
    tile holds every position.
    """

    groups: int
    block_c: int
    block_s: int
    chunk: int
    warps: int


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _widths(group_size: int, groups: int, positions: int, channels_last: bool) -> list[int]:
    """Numbers of groups for a tile: in channels_last 16 channels or more, which fill a sector of memory."""
    least = 16 / group_size if channels_last else 1024 / (group_size * positions)
    first = min(_power_of_two(math.ceil(least)), _power_of_two(groups), max(1, 64 // group_size))
    widths = [first]
    if channels_last and 2 * first <= groups and 2 * first * group_size <= 64:
        widths.append(2 * first)
    return widths


def tilings(
    samples: int, channels: int, positions: int, groups: int, channels_last: bool, direction: str
) -> list[Tiling]:
    """The few tilings worth measuring, the best guess first.

    One kernel wherever a tile of whole groups fits; where that leaves the GPU short of programs, or no tile
    fits, two kernels over chunks of the positions.
    """
    group_size = channels // groups
    candidates = []
    for width in _widths(group_size, groups, positions, channels_last):
        block_c, block_s = _power_of_two(width * group_size), _power_of_two(positions)
        size = block_c * block_s
        if size <= MAX_TILE[direction]:
            warps = [size // (32 * each) for each in PER_THREAD[direction]]
            warps = [w for w in warps if 1 <= w <= 16][:2] or [1]
            candidates += [Tiling(width, block_c, block_s, 0, w) for w in warps]
    width = _widths(group_size, groups, positions, channels_last)[0]
    programs = samples * math.ceil(groups / width)
    if not candidates or programs < MIN_PROGRAMS // 4:
        block_c = _power_of_two(width * group_size)
        block_s = min(max(SPLIT_TILE // block_c, 1), _power_of_two(positions))
        tiles = math.ceil(positions / block_s)
        chunks = min(tiles, MAX_CHUNKS, max(1, math.ceil(2 * MIN_PROGRAMS / max(programs, 1))))
        if tiles > 1:
            candidates.append(Tiling(width, block_c, block_s, math.ceil(tiles / chunks) * block_s, 4))
    return candidates


def _flat(x: Tensor) -> Tensor:
    """[N, C, positions]: a view wherever the strides allow one."""
    return x.flatten(2) if x.ndim > 2 else x.unsqueeze(-1)


def _rows(matrix: Tensor | None) -> tuple[Tensor | None, int]:
    """A matrix [N, C] with contiguous rows, such as half of a chunked one, and the stride of its rows."""
    if matrix is None:
        return None, 0
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    return matrix, matrix.stride(0)


class _Problem:
    """The sizes, strides and parameters that the forward and the backward launches share."""

    def __init__(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        add: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        silu: bool,
        direction: str,
    ):
        self.x = _flat(x)
        self.samples, self.channels, self.positions = self.x.shape
        self.groups, self.group_size, self.silu = num_groups, self.channels // num_groups, silu
        self.channels_last = self.x.stride(1) <= self.x.stride(2) or self.positions == 1
        self.weight = None if weight is None else weight.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        (self.add, add_n), (self.scale, scale_n), (self.shift, shift_n) = map(_rows, (add, scale, shift))
        self.vector_strides = (add_n, scale_n, shift_n)
        self.direction = direction
        present = tuple(t is not None for t in (weight, bias, add, scale, shift))
        self.key = (*self.x.shape, num_groups, self.channels_last, x.dtype, silu, present)

    def fastest(self, launch: Callable[[Tiling], None]) -> None:
        """Launches with the tiling that is the fastest for this problem."""
        sizes = (self.samples, self.channels, self.positions, self.groups)
        candidates = tilings(*sizes, self.channels_last, self.direction)
        op = f"group_norm_silu {self.direction}"
        with torch.cuda.device_of(self.x):
            launch(_triton.fastest(op, self.key, candidates, launch, self.x.device))

    def constants(self, tiling: Tiling) -> dict:
        return {
            "SILU": self.silu,
            "GROUPS": tiling.groups,
            "GROUP_SIZE": self.group_size,
            "BLOCK_C": tiling.block_c,
            "BLOCK_S": tiling.block_s,
            "num_warps": tiling.warps,
            "enable_fp_fusion": True,
        }

    def chunks(self, tiling: Tiling) -> int:
        return math.ceil(self.positions / tiling.chunk) if tiling.chunk else 1

    def blocks(self, tiling: Tiling) -> int:
        return math.ceil(self.groups / tiling.groups)


def _forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    from .triton_kernels import forward_apply_kernel, forward_partial_kernel, forward_tile_kernel

    result = empty_like_x(x)
    mean, rstd = (
        x.new_empty((x.shape[0], num_groups), dtype=dtype) for dtype in (torch.float64, torch.float32)
    )
    if x.numel() == 0:
        return result, mean.fill_(0), rstd.fill_(0)
    p = _Problem(x, num_groups, weight, bias, add, scale, shift, silu, "forward")
    y = _flat(result)
    vectors = (mean, rstd, p.weight, p.bias, p.add, p.scale, p.shift)
    strides = (*p.x.stride(), *y.stride(), *p.vector_strides)

    def launch(tiling: Tiling) -> None:
        blocks, chunks = p.blocks(tiling), p.chunks(tiling)
        grid = (p.samples * chunks * blocks,)
        if tiling.chunk == 0:
            forward_tile_kernel[grid](
                p.x, y, *vectors, eps, p.channels, p.positions, p.groups, blocks, *strides,
                **p.constants(tiling),
            )  # fmt: skip
            return
        partial = rstd.new_empty((p.samples, chunks, 2, p.channels))
        wide = math.ceil(p.channels / tiling.block_c)
        forward_partial_kernel[(p.samples * chunks * wide,)](
            p.x, partial, p.channels, p.positions, tiling.chunk, chunks, wide,
            *p.x.stride(), tiling.block_c, tiling.block_s, num_warps=tiling.warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        forward_apply_kernel[grid](
            p.x, y, partial, *vectors, eps, p.channels, p.positions, p.groups, tiling.chunk, chunks, blocks,
            *strides, BLOCK_K=_chunk_rows(tiling), **p.constants(tiling),
        )  # fmt: skip

    p.fastest(launch)
    return result, mean, rstd


def _chunk_rows(tiling: Tiling) -> int:
    return min(max(PARTIAL_TILE // tiling.block_c, 1), MAX_CHUNKS)


def _backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    silu: bool,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, ...]:
    from .triton_backward import backward_apply_kernel, backward_partial_kernel, backward_tile_kernel

    result = empty_like_x(x)
    sums = tuple(rstd.new_empty(x.shape[:2]) for _ in range(3))
    if x.numel() == 0:
        return result, *(t.fill_(0) for t in sums)
    p = _Problem(x, num_groups, weight, bias, add, scale, shift, silu, "backward")
    g, dx = _flat(grad), _flat(result)
    vectors = (mean, rstd, p.weight, p.bias, p.add, p.scale, p.shift)
    read = (*g.stride(), *p.x.stride())

    def launch(tiling: Tiling) -> None:
        blocks, chunks = p.blocks(tiling), p.chunks(tiling)
        grid = (p.samples * chunks * blocks,)
        if tiling.chunk == 0:
            backward_tile_kernel[grid](
                g, p.x, dx, *sums, *vectors, p.channels, p.positions, p.groups, blocks,
                *read, *dx.stride(), *p.vector_strides, **p.constants(tiling),
            )  # fmt: skip
            return
        partial = rstd.new_empty((p.samples, chunks, 3, p.channels))
        wide = math.ceil(p.channels / tiling.block_c)
        sizes = (p.channels, p.positions, p.groups, tiling.chunk, chunks)
        backward_partial_kernel[(p.samples * chunks * wide,)](
            g, p.x, partial, *vectors, *sizes, wide, *read, *p.vector_strides,
            p.silu, p.group_size, tiling.block_c, tiling.block_s, num_warps=tiling.warps,
            enable_fp_fusion=True,
        )  # fmt: skip
        backward_apply_kernel[grid](
            g, p.x, dx, *sums, partial, *vectors, *sizes, blocks, *read, *dx.stride(), *p.vector_strides,
            BLOCK_K=_chunk_rows(tiling), **p.constants(tiling),
        )  # fmt: skip

    p.fastest(launch)
    return result, *sums


operator.register("group_norm_silu_triton", _forward, _backward)


def supports(arguments: Arguments) -> str | None:
    x, num_groups = arguments.x, arguments.num_groups
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    if x.shape[1] // num_groups > MAX_GROUP_SIZE:
        return f"a group has {x.shape[1] // num_groups} channels, more than {MAX_GROUP_SIZE}"
    return _triton.unsupported(x.device)


def group_norm_silu(arguments: Arguments) -> Tensor:
    *parameters, activation = arguments
    return torch.ops.fused_diffusion.group_norm_silu_triton(*parameters, activation == "silu")[0]
