"""The C++ and CUDA attention: csrc/attention/, read through strides.

Products of float32 are sums of fused multiply-adds, also where torch.backends.cuda.matmul.allow_tf32 is set.
"""

import math

import torch
from torch import Tensor

from ... import _native
from ..._dispatch import constant_in_graphs
from ..._limits import MAX_AMX_POSITIONS, MAX_CUDA_WIDTH, WIDE_HEAD, WIDE_SHARED_MEMORY
from . import library as library  # defines the operators that the libraries implement
from .arguments import Arguments

KEY_TILE = 64  # keys that a block of CUDA takes at a time
MOST_PARTS = 32
LEAST_SAVED = 128 << 10  # bytes of keys and values that a block reads less

# Whether "cuda" takes the kernel by wgmma where it serves. No device has run it yet: the part `wgmma` of
# benchmarks/gpu.sh decides.
WGMMA = False
WGMMA_QUERIES = 128  # of a block


@constant_in_graphs
def _shared_memory(device_index: int | None) -> int:
    properties = torch.cuda.get_device_properties(device_index)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined] # not in torch's stub


@constant_in_graphs
def _processors(device_index: int | None) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count


@constant_in_graphs
def _capability(device_index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def _supports(arguments: Arguments) -> str | None:
    q, k, v, _ = arguments
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q is {q.dtype}, not float32, bfloat16 or float16"
    if q.shape[-1] == 0:
        return "the width of a head is 0"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"the last dimension of {name} is not contiguous"
    return None


def supports_cpp(arguments: Arguments) -> str | None:
    device = arguments.q.device
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device}"
    return _native.CPP_MISSING or _supports(arguments)


def supports_cuda(arguments: Arguments) -> str | None:
    q = arguments.q
    if q.device.type != "cuda":
        return f"it runs on CUDA devices, not on {q.device}"
    if _native.CUDA_MISSING:
        return _native.CUDA_MISSING
    width = q.shape[-1]
    if width > MAX_CUDA_WIDTH:
        return f"the width of a head is {width}, more than {MAX_CUDA_WIDTH}"
    if width > WIDE_HEAD and _shared_memory(q.device.index) < WIDE_SHARED_MEMORY:
        return f"a head of width {width} needs more shared memory than this device has"
    return _supports(arguments)


def key_parts(q: Tensor, processors: int) -> int:
    """Among how many blocks CUDA divides the keys of a head, as csrc/attention/attention.cu does.

    It takes more than one only where a block for every 16 queries leaves half of the multiprocessors idle or
    more, and where each block then reads 128 KB less, which takes about as long as the second kernel.
    """
    batch, heads, positions, width = q.shape
    tiles = math.ceil(positions / KEY_TILE)
    if batch * heads * tiles >= processors:  # a block takes 64 queries
        return 1
    parts = min(max(processors // (batch * heads * math.ceil(positions / 16)), 1), MOST_PARTS)
    of_part = math.ceil(tiles / parts)
    padded = next(size for size in (64, 128, 256) if width <= size)
    saved = (tiles - of_part) * 2 * KEY_TILE * padded * q.element_size()
    return 1 if saved < LEAST_SAVED else math.ceil(tiles / of_part)


def refuses_wgmma(arguments: Arguments) -> str | None:
    """Reason the kernel by wgmma cannot serve a call that "cuda" serves, or None.

    The operator leaves memory that the copy engine cannot read, such as misaligned rows, to the other kernel.
    """
    q = arguments.q
    capability = _capability(q.device.index)
    if capability != (9, 0):
        return f"wgmma is an instruction of compute capability 9.0, not of {capability[0]}.{capability[1]}"
    if q.dtype == torch.float32:
        return "wgmma multiplies bfloat16 and float16, not float32"
    if q.shape[-1] % 8 != 0:
        return f"the copy engine reads 8 numbers at a time, and the width of a head is {q.shape[-1]}"
    return None


def takes_wgmma(arguments: Arguments) -> bool:
    """Whether "cuda" takes the kernel by wgmma: it serves, and its blocks fill the device."""
    q = arguments.q
    if not WGMMA or q.numel() == 0 or refuses_wgmma(arguments):
        return False
    batch, heads, positions, _ = q.shape
    return batch * heads * math.ceil(positions / WGMMA_QUERIES) >= _processors(q.device.index)


def manner_of_cuda(arguments: Arguments) -> str | None:
    q = arguments.q
    if q.numel() == 0:
        return None
    if takes_wgmma(arguments):
        return "by wgmma"
    parts = key_parts(q, _processors(q.device.index))
    return f"the keys in {parts} parts and their softmaxes merged" if parts > 1 else None


def slower_cpp(arguments: Arguments) -> str | None:
    """Reason PyTorch's own op is faster on a CPU, or None, by benchmarks/test_ops.py.

    In float32 on AVX-512 the forward pass is 1.1 to 1.4 times as fast from 2**19 products of the logits on;
    below it is 0.6 to 1.0 times, since calling the operator takes 8 us longer. On AVX2 it is 0.98 times at
    S = 256, D = 256 and 1.1 to 1.2 times to D = 64. In 16 bits it is 1.3 to 2.4 times from 2**17 products
    on. In bfloat16 by AMX it is 1.1 to 2.9 times from 2**21 products on, below 0.5 to 0.9 times, and with the
    gradient 1.2 to 10 times.
    """
    simd = _native.simd_in_use()
    if simd == "baseline":
        return "without AVX2 it has not been measured"
    q, k, v, _ = arguments
    batch, heads, positions, width = q.shape
    single, tiles = q.dtype == torch.float32, q.dtype == torch.bfloat16 and simd == "amx"
    gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    least = 2**19 if single else 2**17
    if tiles:
        least = 2**14 if gradient else 2**21
    if positions < 4 or batch * heads * positions**2 * width < least:
        return f"{tuple(q.shape)} is so small that calling PyTorch's own op takes less time"
    if tiles and positions > MAX_AMX_POSITIONS:
        return "PyTorch's own op multiplies bfloat16 by AMX, also for so many positions"
    if single and width > 128 and simd == "avx2":
        return f"in float32 with AVX2, PyTorch's own op is faster for a width of {width}"
    return None


def attention(arguments: Arguments) -> Tensor:
    q, k, v, _ = arguments
    return torch.ops.fused_diffusion.attention(q, k, v, arguments.scale_or_default())[0]


def attention_by_wgmma(arguments: Arguments) -> Tensor:
    q, k, v, _ = arguments
    return torch.ops.fused_diffusion.attention_wgmma(q, k, v, arguments.scale_or_default())[0]


def attention_on_cuda(arguments: Arguments) -> Tensor:
    return attention_by_wgmma(arguments) if takes_wgmma(arguments) else attention(arguments)
