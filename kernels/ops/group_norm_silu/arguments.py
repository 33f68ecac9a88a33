"""The arguments of group_norm_silu, and which of them are valid."""

from typing import NamedTuple

from torch import Tensor

from ..._arguments import check_integer, check_number, check_tensors

ACTIVATIONS = ("silu", "none")


class Arguments(NamedTuple):
    """The arguments of the public function, except `backend`."""

    x: Tensor
    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    add: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str = "silu"


def validate(arguments: Arguments) -> None:
    x, num_groups, weight, bias, eps, add, scale, shift, activation = arguments
    vectors, matrices = {"weight": weight, "bias": bias}, {"add": add, "scale": scale, "shift": shift}
    check_tensors("group_norm_silu", vectors | matrices, x=x)
    check_integer("num_groups", num_groups)
    check_number("eps", eps)
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"group_norm_silu needs a floating-point x [N, C, ...], not {x.dtype} {list(x.shape)}"
        )
    n, c = x.shape[:2]
    if num_groups < 1 or c % num_groups or num_groups > max(c, 1):
        raise ValueError(f"group_norm_silu: {c} channels cannot be divided into {num_groups} groups")
    if not eps >= 0:
        raise ValueError(f"group_norm_silu: eps must not be negative or NaN, and is {eps}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (c,):
            raise ValueError(f"group_norm_silu: {name} must have shape [{c}], not {list(vector.shape)}")
    for name, matrix in matrices.items():
        if matrix is not None and matrix.shape != (n, c):
            raise ValueError(f"group_norm_silu: {name} must have shape [{n}, {c}], not {list(matrix.shape)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"group_norm_silu: activation must be 'silu' or 'none', not {activation!r}")
