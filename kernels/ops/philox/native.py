"""The C++ and CUDA normals: csrc/philox/."""

import math

import torch
from torch import Tensor

from ... import _native

SCHEMA = "(Tensor sample_ids, int seed, int stream, SymInt elements) -> Tensor"


def fake(sample_ids, seed, stream, elements) -> Tensor:
    return sample_ids.new_empty((sample_ids.shape[0], elements), dtype=torch.float32)


torch.library.define("fused_diffusion::philox_normal", SCHEMA)
torch.library.register_fake("fused_diffusion::philox_normal", fake)


def signed(seed: int) -> int:
    """The int64 with the bits of a uint64, which is what an op's schema can carry."""
    return seed - 2**64 if seed >= 2**63 else seed


def sample_ids_tensor(sample_ids, batch: int, device) -> Tensor:
    if sample_ids is None:
        return torch.arange(batch, device=device)
    return torch.as_tensor(sample_ids, dtype=torch.int64, device=device).contiguous()


def supports_cpp(shape, *, seed, sample_ids, stream, device) -> str | None:
    if torch.device(device).type != "cpu":
        return f"it runs on the CPU, not on {device}"
    return _native.CPP_MISSING


def supports_cuda(shape, *, seed, sample_ids, stream, device) -> str | None:
    if torch.device(device).type != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    return _native.CUDA_MISSING


def philox_normal(shape, *, seed, sample_ids, stream, device) -> Tensor:
    ids = sample_ids_tensor(sample_ids, shape[0], device)
    elements = math.prod(shape[1:])
    return torch.ops.fused_diffusion.philox_normal(ids, signed(seed), stream, elements).reshape(shape)
