"""The C++ convolution: csrc/convolution/, for weights that are packed once and then used many
times."""

import torch
from torch import Tensor

from ... import _native
from ..group_norm_silu.channel_affine import group_norm_affine_
from .packing import PackedWeight

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# x, residual, out: [N, C, H, W] of one dtype in channels_last, or ranges of the channels of such tensors.
# weight: as packed. bias: float32 [K]. affine: see group_norm_affine_. scale: 2 reads each pixel of x as
# 2 x 2. padding: on the left and above; on the right and below it is as large as the size of out needs.
# winograd_m: 0, 2 or 4. amx_limbs: 0, 1 or 3. These are packing.Packing's tile and parts.
torch.library.define(
    "fused_diffusion::convolution_",
    "(Tensor x, Tensor weight, int kernel, int stride, int padding, int scale, int winograd_m, "
    "int amx_limbs, Tensor? bias, Tensor? affine, bool silu, Tensor? residual, Tensor(a!) out) -> ()",
)


@torch.library.register_fake("fused_diffusion::convolution_")
def _fake(
    x, weight, kernel, stride, padding, scale, winograd_m, amx_limbs, bias, affine, silu, residual, out
) -> None:
    return None


convolution_ = torch.ops.fused_diffusion.convolution_


def multiplies_pairs() -> bool:
    """Whether this processor has instructions for products of bfloat16."""
    return _native.simd_in_use() in ("avx512_bf16", "amx")


def supports(
    x,
    weight,
    bias=None,
    *,
    num_groups=None,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    add=None,
    scale=None,
    shift=None,
    activation="none",
    residual=None,
    upsample=False,
) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on the CPU, not on {x.device}"
    if _native.CPP_MISSING:
        return _native.CPP_MISSING
    if not isinstance(weight, PackedWeight):
        return "the weight is not packed; see pack_conv3x3"
    if weight.packing.pairs and not multiplies_pairs():
        return "the weight is packed for a processor that multiplies pairs of bfloat16"
    if weight.packing.parts and _native.simd_in_use() != "amx":
        return "the weight is packed for a processor with AMX"
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}, not float32, bfloat16 or float16"
    tensors = {
        "x": x,
        "bias": bias,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "add": add,
        "scale": scale,
        "shift": shift,
        "residual": residual,
    }
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, not float32, bfloat16 or float16"
        if tensor.device != x.device:
            return f"{name} is on {tensor.device}, x on {x.device}"
        if torch.is_grad_enabled() and tensor.requires_grad:
            return f"{name} requires a gradient, which this backend does not compute"
    return None


def conv3x3(
    x,
    weight: PackedWeight,
    bias=None,
    *,
    num_groups=None,
    norm_weight=None,
    norm_bias=None,
    eps=1e-5,
    add=None,
    scale=None,
    shift=None,
    activation="none",
    residual=None,
    upsample=False,
) -> Tensor:
    def channels_last(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last)

    x = channels_last(x)
    silu, affine = activation == "silu", None
    if num_groups is not None:
        rows = 4 if weight.packing.parts == 3 else 3  # bytes need bounds of what they multiply
        affine = x.new_empty((rows, *x.shape[:2]), dtype=torch.float32)
        group_norm_affine_(x, num_groups, norm_weight, norm_bias, eps, add, scale, shift, silu, affine)
    factor = 2 if upsample else 1
    shape = (x.shape[0], weight.shape[0], factor * x.shape[2], factor * x.shape[3])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    bias = None if bias is None else bias.float().contiguous()
    residual = None if residual is None else channels_last(residual.to(x.dtype))
    tile, parts = weight.packing.tile, weight.packing.parts
    convolution_(x, weight.data, 3, 1, 1, factor, tile, parts, bias, affine, silu, residual, out)
    return out
