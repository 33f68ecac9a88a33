"""Convolutions: conv2d, differentiable, for training; conv3x3, fused, over packed weights, for sampling."""

import torch

from ..._registry import InternalOp, PublicOp
from .arguments import Conv2dArguments, Conv3x3Arguments
from .differentiable import conv2d
from .differentiable import op as conv2d_op
from .fused import conv3x3, pack_conv3x3
from .fused import op as conv3x3_op

__all__ = ["conv2d", "conv3x3", "pack_conv3x3"]


def _example_of_conv2d(device: str) -> Conv2dArguments:
    x = torch.zeros(2, 32, 8, 8, device=device, dtype=torch.bfloat16)
    return Conv2dArguments(x, x.new_zeros(32, 32, 3, 3).requires_grad_(), padding=1)


def _example_of_conv3x3(device: str) -> Conv3x3Arguments:
    x = torch.zeros(2, 32, 8, 8, device=device)
    return Conv3x3Arguments(x, pack_conv3x3(torch.zeros(32, 32, 3, 3, device=device), 8, 8))


OPS = (
    PublicOp(conv2d, conv2d_op, Conv2dArguments, _example_of_conv2d),
    PublicOp(conv3x3, conv3x3_op, Conv3x3Arguments, _example_of_conv3x3),
)
INTERNAL = tuple(map(InternalOp, ("convolution_", "upsample_nearest2x_", "average_pool_")))
