"""The operators of csrc/convolution/ for torch.library: schemas and fakes.

Each writes into tensors of the caller, or computes something that conv2d's autograd functions ask for; none
has a derivative of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..._library import define
from ..._limits import LANES
from .packing import PackedWeight

# Activations of an output, in the order of the enum Activation of csrc/convolution/args.h. "gelu" is
# torch.nn.functional.gelu, "gelu_tanh" the same with approximate="tanh", "geglu" is value * gelu(gate).
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "geglu")


class ConvolutionArguments(NamedTuple):
    """The arguments of `convolution_`, in the order of its schema.

    x, residual, out: [N, C, H, W] of one dtype in channels_last, or ranges of the channels of such tensors.
    weight, winograd_m, amx_limbs, panel: see `packing.PackedWeight`. kernel: 1 or 3, the side of the filter.
    padding: zeros on the left and above; out's size says how many are on the right and below.
    scale: 2 reads each pixel of x as 2 x 2 pixels, 1 as one.
    bias: float32 [K].
    affine, silu: the normalisation and the activation of x before the convolution; see `group_norm_affine_`.
    activation: of the sums with their bias, before the residual; an index of ACTIVATIONS. For "geglu" the
    rows of weight and bias are in the order of `packing.interleave_gates`; out has a channel for two rows.
    factor: of the sum with the residual, last of all.
    """

    x: Tensor
    weight: Tensor
    kernel: int
    stride: int
    padding: int
    scale: int
    winograd_m: int
    amx_limbs: int
    bias: Tensor | None
    affine: Tensor | None
    silu: bool
    residual: Tensor | None
    out: Tensor
    activation: int
    factor: float
    panel: int


def convolution_arguments(
    x: Tensor,
    weight: PackedWeight,
    out: Tensor,
    *,
    stride: int = 1,
    padding: int | None = None,
    scale: int = 1,
    bias: Tensor | None = None,
    affine: Tensor | None = None,
    silu: bool = False,
    residual: Tensor | None = None,
    activation: str = "none",
    factor: float = 1.0,
) -> ConvolutionArguments:
    """The arguments of a call with a packed weight.

    padding: default kernel // 2. activation: one of ACTIVATIONS; ValueError for another.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"there is no activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
    kernel = weight.shape[-1]
    return ConvolutionArguments(
        x=x,
        weight=weight.data,
        kernel=kernel,
        stride=stride,
        padding=kernel // 2 if padding is None else padding,
        scale=scale,
        winograd_m=weight.packing.winograd_m,
        amx_limbs=weight.packing.amx_limbs,
        bias=bias,
        affine=affine,
        silu=silu,
        residual=residual,
        out=out,
        activation=ACTIVATIONS.index(activation),
        factor=factor,
        panel=weight.packing.panel,
    )


convolution_ = define(
    "convolution_",
    "(Tensor x, Tensor weight, int kernel, int stride, int padding, int scale, int winograd_m, "
    "int amx_limbs, Tensor? bias, Tensor? affine, bool silu, Tensor? residual, Tensor(a!) out, "
    "int activation=0, float factor=1.0, int panel=64) -> ()",
)

# Nearest-neighbour upsampling. x: [N, C, H, W] in channels_last, or a range of the channels of such a tensor.
# out: [N, C, 2 H, 2 W], likewise.
upsample_nearest2x_ = define("upsample_nearest2x_", "(Tensor x, Tensor(a!) out) -> ()")

# Averages over squares of window x window pixels, 1 or 2, of x, which is normalised and activated first. x,
# out: like above, of one dtype; out is [N, C, H // window, W // window]. affine, silu: like convolution_'s.
average_pool_ = define(
    "average_pool_", "(Tensor x, Tensor? affine, bool silu, int window, Tensor(a!) out) -> ()"
)


def _fake_weight_gradient(grad: Tensor, x: Tensor, side: int, *_: int) -> tuple[Tensor, ...]:
    shape = (grad.shape[1], side, side, x.shape[1])
    return tuple(grad.new_empty(size, dtype=torch.float32) for size in (shape, shape[:1]))


# grad: [N, K, H', W'], x: [N, C, H, W], bfloat16, channels_last. side: of the kernel, 1 or 3. stride: 1 or 2.
# padding: less than the side. weight: float32 [K, side, side, C]. bias: float32 [K].
convolution_weight_gradient = define(
    "convolution_weight_gradient",
    "(Tensor grad, Tensor x, int side, int stride, int padding) -> (Tensor weight, Tensor bias)",
    _fake_weight_gradient,
)


def _fake_pack_winograd(weight: Tensor, transposed: bool, panel: int) -> Tensor:
    outputs, channels = reversed(weight.shape[:2]) if transposed else weight.shape[:2]
    return weight.new_empty(36 * (-(-outputs // LANES) * LANES) * channels)


# Packs a weight, float32 [K, C, 3, 3] of any strides, for `convolution_` with winograd_m = 4; or, transposed,
# that of the gradient of the input: [C, K, 3, 3] with the taps in reverse order. panel: as `packing.Packing`.
pack_winograd = define(
    "pack_winograd", "(Tensor weight, bool transposed, int panel) -> Tensor", _fake_pack_winograd
)


def _fake_winograd_weight_gradient(grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return _fake_weight_gradient(grad, x, 3)


# grad: [N, K, H, W], x: [N, C, H, W], float32 in channels_last, or ranges of the channels of such tensors.
# Gives the gradients of a 3 x 3 convolution with stride and padding 1: weight [K, 3, 3, C], bias [K].
winograd_weight_gradient = define(
    "winograd_weight_gradient",
    "(Tensor grad, Tensor x) -> (Tensor weight, Tensor bias)",
    _fake_winograd_weight_gradient,
)
