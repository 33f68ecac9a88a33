"""Group normalisation, the modulation that follows it in a UNet block, and SiLU, as one op."""

import torch

from ..._dispatch import Backend, Op, always
from ..._registry import InternalOp, PublicOp
from . import native, reference, triton_launch
from .arguments import Arguments, validate

__all__ = ["group_norm_silu"]

op = Op(
    "group_norm_silu",
    {
        "cuda": Backend(native.group_norm_silu, native.supports_cuda),
        "triton": Backend(triton_launch.group_norm_silu, triton_launch.supports),
        "cpp": Backend(native.group_norm_silu, native.supports_cpp),
        "reference": Backend(reference.group_norm_silu, always),
    },
    validate,
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

    x: [N, C, *spatial], floating point, contiguous or channels_last.
    num_groups: a divisor of C.
    weight, bias: [C].
    eps: is added to the variance; at least 0.
    add, scale, shift: [N, C].
    activation: "silu" (x * sigmoid(x)) or "none".
    Returns a tensor of x's shape, dtype and memory layout. Statistics and all arithmetic are in float32
    (float64 for float64). ValueError: shapes that do not fit, or a backend that cannot serve the call.
    TypeError: an argument of another type. Forward-mode derivatives and torch.func are the reference's.
    """
    return op(Arguments(x, num_groups, weight, bias, eps, add, scale, shift, activation), backend)


OPS = (
    PublicOp(
        group_norm_silu, op, Arguments, lambda device: Arguments(torch.zeros(2, 32, 8, 8, device=device), 32)
    ),
)
INTERNAL = (InternalOp("group_norm_affine_"),)
