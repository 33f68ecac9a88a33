"""Group normalisation, the modulation that follows it in a UNet block, and SiLU, as one op."""

import torch

from ..._arguments import check_integer, check_number, check_tensors
from ..._dispatch import Backend, Op, always
from . import native, reference, triton_launch

ACTIVATIONS = ("silu", "none")


def _validate(
    x, num_groups, weight=None, bias=None, eps=1e-5, *, add=None, scale=None, shift=None, activation="silu"
) -> None:
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


op = Op(
    "group_norm_silu",
    {
        "cuda": Backend(native.group_norm_silu, native.supports_cuda),
        "triton": Backend(triton_launch.group_norm_silu, triton_launch.supports),
        "cpp": Backend(native.group_norm_silu, native.supports_cpp),
        "reference": Backend(reference.group_norm_silu, always),
    },
    _validate,
)


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    *,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str = "silu",
    backend: str = "auto",
) -> torch.Tensor:
    """`activation(group_norm(x + add) * (1 + scale) + shift)`, differentiable in every tensor.

    Group normalisation is that of Wu and He 2018 (arXiv:1803.08494, equation 2), with the biased variance;
    `add` carries the time embedding of DDPM (Ho et al. 2020, appendix B), `scale` and `shift` the adaptive
    group norm of Dhariwal and Nichol 2021 (section 3.1, with y_s = 1 + scale).

    x: [N, C, *spatial], floating point, contiguous or channels_last. weight, bias: [C].
    add, scale, shift: [N, C]. activation: "silu" (x * sigmoid(x)) or "none".
    Returns a tensor of x's shape, dtype and memory layout. Statistics and all arithmetic are in float32
    (float64 for float64). ValueError: shapes that do not fit, or a backend that cannot serve the call;
    TypeError: what is no tensor or number. Forward-mode derivatives and torch.func are the reference's.
    """
    return op(
        x,
        num_groups,
        weight,
        bias,
        eps,
        add=add,
        scale=scale,
        shift=shift,
        activation=activation,
        backend=backend,
    )
