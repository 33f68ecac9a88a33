"""A 3 x 3 convolution with what surrounds it in a UNet: normalisation and activation before, residual
after."""

import torch

from ... import _native
from ..._arguments import check_integer, check_number, check_tensors
from ..._dispatch import Backend, Op, always
from ..group_norm_silu import ACTIVATIONS
from . import native, reference
from .packing import PackedWeight, choose_packing, pack


def _validate(
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
) -> None:
    plain = weight.weight if isinstance(weight, PackedWeight) else weight
    vectors, matrices = {"norm_weight": norm_weight, "norm_bias": norm_bias}, {"add": add, "scale": scale}
    matrices["shift"] = shift
    check_tensors("conv3x3", {"bias": bias, "residual": residual, **vectors, **matrices}, x=x, weight=plain)
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"conv3x3 needs a floating-point x [N, C, H, W], not {x.dtype} {list(x.shape)}")
    n, c = x.shape[:2]
    k = plain.shape[0] if plain.ndim else 0
    if c == 0:
        raise ValueError("conv3x3 needs at least one channel")
    if plain.shape != (k, c, 3, 3):
        raise ValueError(f"conv3x3: weight must have shape [K, {c}, 3, 3], not {list(plain.shape)}")
    if bias is not None and bias.shape != (k,):
        raise ValueError(f"conv3x3: bias must have shape [{k}], not {list(bias.shape)}")
    for tensors, shape in ((vectors, (c,)), (matrices, (n, c))):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.shape != shape:
                raise ValueError(f"conv3x3: {name} must have shape {list(shape)}, not {list(tensor.shape)}")
    factor = 2 if upsample else 1
    shape = (n, k, factor * x.shape[2], factor * x.shape[3])
    if residual is not None and residual.shape != shape:
        raise ValueError(f"conv3x3: residual must have shape {list(shape)}, not {list(residual.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"conv3x3: activation must be 'silu' or 'none', not {activation!r}")
    check_number("eps", eps)
    if num_groups is not None:
        check_integer("num_groups", num_groups)
        if num_groups < 1 or c % num_groups or num_groups > max(c, 1):
            raise ValueError(f"conv3x3: {c} channels cannot be divided into {num_groups} groups")
        if not eps >= 0:
            raise ValueError(f"conv3x3: eps must not be negative or NaN, and is {eps}")
    elif activation != "none" or any(t is not None for t in (*vectors.values(), *matrices.values())):
        raise ValueError("conv3x3: without num_groups nothing is normalised, modulated or activated")


op = Op(
    "conv3x3",
    {
        "cpp": Backend(native.conv3x3, native.supports),
        "reference": Backend(reference.conv3x3, always),
    },
    _validate,
)


def pack_conv3x3(
    weight: torch.Tensor, height: int, width: int, dtype: torch.dtype = torch.float32
) -> PackedWeight:
    """A weight [K, C, 3, 3] transformed once, for `conv3x3` on a CPU to maps of height x width pixels.

    Processors with AMX multiply tiles. Elsewhere the size of the map decides between Winograd's algorithm and
    the direct one; other sizes are as right, but slower. dtype: bfloat16 lets processors with AMX or
    AVX512_BF16 multiply in it; other dtypes, and other processors, multiply in float32 or as exactly. The
    packed weight takes up to four times the memory, and does not follow later changes of `weight`.
    ValueError: another shape.
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

    x: [N, C, H, W]. weight: [K, C, 3, 3], or what `pack_conv3x3` makes of it, which the C++ backend needs.
    bias: [K]. norm_weight, norm_bias: [C]. add, scale, shift: [N, C]. residual: [N, K, H, W], or twice that
    size.
    Returns [N, K, H, W] in x's dtype; the C++ backend in channels_last. It uses Winograd's algorithm (Lavin &
    Gray 2016, arXiv:1509.09308) by the size of the map, and AMX, for which a float32 is three bytes, in units
    of the largest number of its image: in float32 the error is below 2e-5 of the largest output, in bfloat16
    below 1e-2. NaN and infinity spoil the outputs that read them, and no others; by AMX, infinity gives NaN.
    An image's result does not depend on the others of its batch.
    ValueError: shapes that do not fit, or a backend that cannot serve the call; TypeError: what is no tensor.
    """
    return op(
        x,
        weight,
        bias,
        num_groups=num_groups,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        eps=eps,
        add=add,
        scale=scale,
        shift=shift,
        activation=activation,
        residual=residual,
        upsample=upsample,
        backend=backend,
    )
