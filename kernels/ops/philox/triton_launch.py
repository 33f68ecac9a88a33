"""The normals in Triton: fused_diffusion::philox_normal_triton."""

import math

import torch
from torch import Tensor

from ... import _triton
from .native import SCHEMA, fake, sample_ids_tensor, signed

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


torch.library.define("fused_diffusion::philox_normal_triton", SCHEMA)
torch.library.register_fake("fused_diffusion::philox_normal_triton", fake)
torch.library.impl("fused_diffusion::philox_normal_triton", ("cpu", "cuda"), _philox_normal)


def supports(shape, *, seed, sample_ids, stream, device) -> str | None:
    return _triton.unsupported(torch.device(device))


def philox_normal(shape, *, seed, sample_ids, stream, device) -> Tensor:
    ids = sample_ids_tensor(sample_ids, shape[0], device)
    elements = math.prod(shape[1:])
    return torch.ops.fused_diffusion.philox_normal_triton(ids, signed(seed), stream, elements).reshape(shape)
