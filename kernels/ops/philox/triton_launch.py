"""The normals in Triton: fused_diffusion::philox_normal_triton."""

import math

import torch
from torch import Tensor

from ... import _triton
from ..._library import implement
from .arguments import Arguments
from .library import define, fake, operator_arguments

BLOCKS = 256  # noise blocks of four normals to a program


def _philox_normal(sample_ids: Tensor, seed: int, stream: int, elements: int) -> Tensor:
    from .triton_kernels import philox_normal_kernel

    z = fake(sample_ids, seed, stream, elements)
    tiles = math.ceil(elements / (4 * BLOCKS))
    if z.numel() > 0:
        with torch.cuda.device_of(z):
            philox_normal_kernel[(z.shape[0] * tiles,)](
                z, sample_ids, seed, stream, elements, tiles, BLOCKS, num_warps=4, enable_fp_fusion=False
            )
    return z


define("philox_normal_triton")
implement("philox_normal_triton", _philox_normal)


def supports(arguments: Arguments) -> str | None:
    return _triton.unsupported(torch.device(arguments.device))


def philox_normal(arguments: Arguments) -> Tensor:
    inputs = operator_arguments(arguments)
    return torch.ops.fused_diffusion.philox_normal_triton(*inputs).reshape(arguments.shape)
