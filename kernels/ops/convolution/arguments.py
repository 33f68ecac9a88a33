"""The arguments of conv2d and conv3x3, and which of them are valid."""

from typing import NamedTuple

from torch import Tensor

from ..._arguments import check_integer, check_number, check_tensors
from ..group_norm_silu.arguments import ACTIVATIONS
from ..group_norm_silu.arguments import Arguments as NormArguments
from .packing import PackedWeight


class Conv2dArguments(NamedTuple):
    """The arguments of conv2d, except `backend`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: int = 1
    padding: int = 0


class Conv3x3Arguments(NamedTuple):
    """The arguments of conv3x3, except `backend`."""

    x: Tensor
    weight: Tensor | PackedWeight
    bias: Tensor | None = None
    num_groups: int | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    eps: float = 1e-5
    add: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "none"
    residual: Tensor | None = None
    upsample: bool = False

    def norm(self) -> NormArguments | None:
        """The arguments of the normalisation before the convolution, or None without one."""
        if self.num_groups is None:
            return None
        return NormArguments(
            self.x,
            self.num_groups,
            self.norm_weight,
            self.norm_bias,
            self.eps,
            self.add,
            self.scale,
            self.shift,
            self.activation,
        )


def validate_conv2d(arguments: Conv2dArguments) -> None:
    x, weight, bias, stride, padding = arguments
    check_tensors("conv2d", {"bias": bias}, x=x, weight=weight)
    check_integer("stride", stride)
    check_integer("padding", padding)
    if stride < 1 or padding < 0:
        raise ValueError(f"conv2d: stride must be at least 1 and padding 0, not {stride} and {padding}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"conv2d needs a floating-point x [N, C, H, W], not {x.dtype} {list(x.shape)}")
    if weight.ndim != 4 or weight.shape[1] != x.shape[1]:
        raise ValueError(f"conv2d: weight must be [K, {x.shape[1]}, R, S], not {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"conv2d: bias must have shape [{len(weight)}], not {list(bias.shape)}")


def validate_conv3x3(arguments: Conv3x3Arguments) -> None:
    x, weight, bias, num_groups, norm_weight, norm_bias, eps, add, scale, shift = arguments[:10]
    activation, residual, upsample = arguments[10:]
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
    output = (n, k, factor * x.shape[2], factor * x.shape[3])
    if residual is not None and residual.shape != output:
        raise ValueError(f"conv3x3: residual must have shape {list(output)}, not {list(residual.shape)}")
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
