"""A 3 x 3 convolution fused with its neighbours in a UNet: normalisation and activation before it, a residual
after it."""

import torch

from ... import _native
from ..._arguments import check_tensors
from ..._dispatch import Backend, Op, always
from . import native, reference
from .arguments import Conv3x3Arguments, validate_conv3x3
from .packing import PackedWeight, choose_packing, pack

op = Op(
    "conv3x3",
    {
        "cpp": Backend(native.conv3x3, native.supports),
        "reference": Backend(reference.conv3x3, always),
    },
    validate_conv3x3,
)


def pack_conv3x3(
    weight: torch.Tensor, height: int, width: int, dtype: torch.dtype = torch.float32
) -> PackedWeight:
    """A weight [K, C, 3, 3] packed once, for `conv3x3` on a CPU to maps of height x width pixels.

    Processors with AMX multiply tiles. On others the size of the map decides between Winograd's algorithm and
    the direct one; maps of another size get correct results, but slower. dtype: bfloat16 lets processors with
    AMX or AVX512_BF16 multiply in bfloat16; other dtypes, and other processors, multiply in float32 or as
    exactly. The packed weight takes up to four times the memory. Later changes of `weight` do not change it.
    ValueError: another shape. TypeError: the weight is not a tensor.
    """
    check_tensors("pack_conv3x3", weight=weight)
    if weight.ndim != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"pack_conv3x3 needs a weight [K, C, 3, 3], not {list(weight.shape)}")
    return pack(weight, choose_packing(weight.shape, height, width, dtype, _native.simd_in_use()))


def conv3x3(
    x: torch.Tensor,
    weight: torch.Tensor | PackedWeight,
    bias: torch.Tensor | None = None,
    *,
    num_groups: int | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    upsample: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """`conv2d(up(h), weight, bias, padding=1) + residual`, where h is x, or a `group_norm_silu` of it.

    With num_groups, h = activation(group_norm(x + add) * (1 + scale) + shift); without, h = x and there is
    nothing to modulate. up is the identity, or with `upsample` nearest-neighbour interpolation to twice the
    size. This is half a residual block of DDPM (Ho et al. 2020, appendix B).

    x: [N, C, H, W].
    weight: [K, C, 3, 3], or the result of `pack_conv3x3`, which the C++ backend needs.
    bias: [K].
    num_groups: a divisor of C; None for no normalisation.
    norm_weight, norm_bias: [C].
    eps: is added to the variance; at least 0.
    add, scale, shift: [N, C].
    activation: "silu" or "none".
    residual: [N, K, H, W], or with `upsample` [N, K, 2H, 2W].
    Returns a tensor of the residual's shape in x's dtype; the C++ backend in channels_last. It takes
    Winograd's algorithm (Lavin & Gray 2016, arXiv:1509.09308) depending on the size of the map, or AMX, for
    which a float32 becomes three int8 limbs in units of the largest number of its image. In float32 the error
    is below 2e-5 of the largest output, in bfloat16 below 1e-2. NaN and infinity reach only the outputs that
    read them; with AMX, infinity gives NaN. An image's result does not depend on the other images of its
    batch.
    ValueError: shapes that do not fit, or a backend that cannot serve the call. TypeError: an argument of
    another type.
    """
    return op(
        Conv3x3Arguments(
            x,
            weight,
            bias,
            num_groups,
            norm_weight,
            norm_bias,
            eps,
            add,
            scale,
            shift,
            activation,
            residual,
            upsample,
        ),
        backend,
    )
