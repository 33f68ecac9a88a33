"""Each op forward and backward at small shapes, for compute-sanitizer: without pytest, Triton and graphs.

    python -m benchmarks.gpu.sanitized cuda ops
    python -m benchmarks.gpu.sanitized cuda wgmma

The second is attention by wgmma alone.
"""

import sys

import torch

from diffusion.kernels import (
    attention,
    group_norm_silu,
    philox_normal,
    reverse_step,
    reverse_step_,
    step_counter,
)
from diffusion.kernels._native import CPP_MISSING
from diffusion.kernels.ops.attention import native
from diffusion.kernels.ops.attention.arguments import Arguments
from diffusion.kernels.ops.biased_sum.library import biased_sum_
from diffusion.kernels.ops.reverse_step.library import step_embeddings_

DTYPES = (torch.float32, torch.bfloat16)
# Shapes for which, together, every kernel of an op is launched on a device with 132 multiprocessors
# (tests/kernels/on_host/). Norms: shape, and whether it is in channels_last; the last two in chunks.
NORMS = (
    ((2, 32, 7, 5), True),
    ((1, 64, 16, 16), True),
    ((2, 24, 9, 3), False),
    ((1, 16, 64, 64), True),
    ((1, 8, 192, 192), False),
)
# The last but one has a block for each multiprocessor, and the last the keys in parts.
ATTENTION = ((1, 2, 33, 24), (2, 1, 64, 64), (1, 1, 70, 256), (140, 1, 20, 24), (1, 1, 256, 256))
WGMMA = ((1, 2, 33, 24), (1, 1, 520, 64), (1, 1, 300, 128), (1, 1, 300, 256))  # all buffers more than once


def normal(*shape: int, dtype: torch.dtype, device: str, last: bool = False) -> torch.Tensor:
    """Random numbers drawn on the host, so that the sanitizer checks no kernels of PyTorch."""
    x = torch.randn(shape).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return x.to(device).requires_grad_()


def run_ops(device: str) -> None:
    backend = "cuda" if device == "cuda" else "auto"
    for dtype in DTYPES:
        to = {"dtype": dtype, "device": device}
        for shape, last in NORMS:
            x, add = normal(*shape, last=last, **to), normal(*shape[:2], **to)
            weight, bias = (normal(shape[1], **to) for _ in range(2))
            y = group_norm_silu(x, 8, weight, bias, add=add, backend=backend)
            torch.autograd.grad(y, (x, add, weight, bias), y.detach())
        for shape in ATTENTION:
            q, k, v = (normal(*shape, **to) for _ in range(3))
            y = attention(q, k, v, backend=backend)
            torch.autograd.grad(y, (q, k, v), y.detach())
        for batch, side, last in ((2, 8, True), (3, 5, False)):
            out = normal(2 * batch, 3, side, side, last=last, **to).detach()
            both, x = out.chunk(2), normal(batch, 3, side, side, dtype=torch.float32, device=device).detach()
            row = (500, 3.0, 3.58, -3.44, 1.0, 0.99, 0.01, 0.0, 0.0, 0.1, 0.0, 0.0)
            reverse_step(x, both[0], row, model_output_uncond=both[1], backend=backend)
            table = torch.tensor([row], dtype=torch.float64).to(device)
            counter, ids = step_counter(0, device=device), torch.arange(batch).to(device)
            options = {"model_output_uncond": both[1], "unet_input": torch.empty_like(out)}
            reverse_step_(x, both[0], table, counter, sample_ids=ids, backend=backend, **options)
        for channels in (16, 5):
            x, residual = (normal(2, channels, 3, 4, last=True, **to).detach() for _ in range(2))
            wide = normal(2, 40, 6, 8, last=True, **to).detach()
            bias = normal(channels, **to).detach()
            biased_sum_(x, bias, residual, wide[:, :channels], wide[:, -channels:], scale=2)
            biased_sum_(x, None, residual, x, residual)
    if device == "cuda" or not CPP_MISSING:
        for width in (6, 520):
            embeddings, index = torch.randn(4, 3, width).to(device), torch.tensor([2, 0, 1]).to(device)
            out = torch.empty(3, width, device=device)
            step_embeddings_(embeddings, step_counter(0, device=device), index, out)
    philox_normal((3, 3, 17, 9), seed=7, device=device, backend=backend)


def run_wgmma(device: str) -> None:
    """The operator; on the CPU, which lacks it, what `attention` takes."""
    for shape in WGMMA:
        q, k, v = (normal(*shape, dtype=torch.bfloat16, device=device) for _ in range(3))
        arguments = Arguments(q, k, v)
        y = native.attention_by_wgmma(arguments) if device == "cuda" else attention(q, k, v)
        torch.autograd.grad(y, (q, k, v), y.detach())


RUN = {"ops": run_ops, "wgmma": run_wgmma}


if __name__ == "__main__":
    RUN[sys.argv[2]](sys.argv[1])
    if sys.argv[1] == "cuda":
        torch.cuda.synchronize()
    print(f"{sys.argv[2]}: all ran")
