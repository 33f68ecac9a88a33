"""The fused C++ convolution: csrc/convolution/, for weights that are packed once and then used many times."""

import torch
from torch import Tensor

from ... import _native
from ..group_norm_silu.library import group_norm_affine_
from .arguments import Conv3x3Arguments
from .library import convolution_, convolution_arguments
from .packing import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def multiplies_bf16_pairs() -> bool:
    """Whether this processor has instructions for products of pairs of bfloat16."""
    return _native.simd_in_use() in ("avx512_bf16", "amx")


def supports(arguments: Conv3x3Arguments) -> str | None:
    x, weight = arguments.x, arguments.weight
    if x.device.type != "cpu":
        return f"it runs on the CPU, not on {x.device}"
    if _native.CPP_MISSING:
        return _native.CPP_MISSING
    if not isinstance(weight, PackedWeight):
        return "the weight is not packed; see pack_conv3x3"
    if weight.packing.bf16_pairs and not multiplies_bf16_pairs():
        return "the weight is packed for a processor that multiplies pairs of bfloat16"
    if weight.packing.amx_limbs and _native.simd_in_use() != "amx":
        return "the weight is packed for a processor with AMX"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    for name, tensor in zip(arguments._fields, arguments, strict=True):
        if not isinstance(tensor, Tensor):
            continue
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
        if torch.is_grad_enabled() and tensor.requires_grad:
            return f"{name} requires a gradient, which this backend does not compute"
    return None


def conv3x3(arguments: Conv3x3Arguments) -> Tensor:
    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    weight, bias, residual = arguments.weight, arguments.bias, arguments.residual
    assert isinstance(weight, PackedWeight)
    x = channels_last(arguments.x)
    silu, affine = arguments.activation == "silu", None
    norm = arguments.norm()
    if norm is not None:
        rows = 4 if weight.packing.amx_limbs == 3 else 3  # int8 limbs need a bound of each channel
        affine = x.new_empty((rows, *x.shape[:2]), dtype=torch.float32)
        _, *parameters, _ = norm
        group_norm_affine_(x, *parameters, silu, affine)
    factor = 2 if arguments.upsample else 1
    shape = (x.shape[0], weight.shape[0], factor * x.shape[2], factor * x.shape[3])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    convolution_(
        *convolution_arguments(
            x,
            weight,
            out,
            scale=factor,
            bias=None if bias is None else bias.float().contiguous(),
            affine=affine,
            silu=silu,
            residual=None if residual is None else channels_last(residual.to(x.dtype)),
        )
    )
    return out
