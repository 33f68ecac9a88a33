"""Each op forward and backward at small shapes, for compute-sanitizer: without pytest, Triton and graphs."""

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
from diffusion.kernels.ops.biased_sum.library import biased_sum_
from diffusion.kernels.ops.reverse_step.library import step_embeddings_

device = sys.argv[1]
backend = "cuda" if device == "cuda" else "auto"


def normal(*shape: int, dtype: torch.dtype, last: bool = False) -> torch.Tensor:
    """Random numbers drawn on the host, so that the sanitizer checks no kernels of PyTorch."""
    x = torch.randn(shape).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return x.to(device).requires_grad_()


for dtype in (torch.float32, torch.bfloat16):
    for shape, last in (((2, 32, 7, 5), True), ((1, 64, 16, 16), True), ((2, 24, 9, 3), False)):
        x, add = normal(*shape, dtype=dtype, last=last), normal(*shape[:2], dtype=dtype)
        weight, bias = (normal(shape[1], dtype=dtype) for _ in range(2))
        y = group_norm_silu(x, 8, weight, bias, add=add, backend=backend)
        torch.autograd.grad(y, (x, add, weight, bias), y.detach())
    for shape in ((1, 2, 33, 24), (2, 1, 64, 64), (1, 1, 70, 256)):
        q, k, v = (normal(*shape, dtype=dtype) for _ in range(3))
        y = attention(q, k, v, backend=backend)
        torch.autograd.grad(y, (q, k, v), y.detach())
    for batch, side, last in ((2, 8, True), (3, 5, False)):
        out = normal(2 * batch, 3, side, side, dtype=dtype, last=last).detach()
        both, x = out.chunk(2), normal(batch, 3, side, side, dtype=torch.float32).detach()
        row = (500, 3.0, 3.58, -3.44, 1.0, 0.99, 0.01, 0.0, 0.0, 0.1, 0.0, 0.0)
        reverse_step(x, both[0], row, model_output_uncond=both[1], backend=backend)
        table = torch.tensor([row], dtype=torch.float64).to(device)
        counter, ids = step_counter(0, device=device), torch.arange(batch).to(device)
        options = {"model_output_uncond": both[1], "unet_input": torch.empty_like(out), "backend": backend}
        reverse_step_(x, both[0], table, counter, sample_ids=ids, **options)
    for channels in (16, 5):
        x, residual = (normal(2, channels, 3, 4, dtype=dtype, last=True).detach() for _ in range(2))
        wide = normal(2, 40, 6, 8, dtype=dtype, last=True).detach()
        bias = normal(channels, dtype=dtype).detach()
        biased_sum_(x, bias, residual, wide[:, :channels], wide[:, -channels:], scale=2)
        biased_sum_(x, None, residual, x, residual)
if device == "cuda" or not CPP_MISSING:
    for width in (6, 520):
        embeddings, index = torch.randn(4, 3, width).to(device), torch.tensor([2, 0, 1]).to(device)
        out = torch.empty(3, width, device=device)
        step_embeddings_(embeddings, step_counter(0, device=device), index, out)
philox_normal((3, 3, 17, 9), seed=7, device=device, backend=backend)
if device == "cuda":
    torch.cuda.synchronize()
print("every op ran")
