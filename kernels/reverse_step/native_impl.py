"""The C++ and CUDA reverse step: csrc/reverse_step.{h,cpp,cu}, noise included, in one pass."""

import torch
from torch import Tensor

from .. import _native
from ..philox.native_impl import sample_ids_tensor, signed
from .row import Row, as_row

# table: float64 [rows, 12]. counter: int64 [3], (step, seed, stream of step 0). Both are on x's device: the
# row is table[step] and the noise stream is stream + step, so that one CUDA graph serves every step.
torch.library.define(
    "fused_diffusion::reverse_step",
    "(Tensor x, Tensor model_output, Tensor? model_output_uncond, Tensor? x0_prev, Tensor? noise, "
    "Tensor table, Tensor counter, Tensor sample_ids) -> (Tensor, Tensor)",
)


@torch.library.register_fake("fused_diffusion::reverse_step")
def _fake(x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids):
    return torch.empty_like(x), torch.empty_like(x)


def _supports(x, model_output, model_output_uncond, x0_prev, noise) -> str | None:
    if x.dtype != torch.float32:
        return f"x is {x.dtype}, not float32"
    if model_output.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"model_output is {model_output.dtype}, not float32, bfloat16 or float16"
    if model_output_uncond is not None and model_output_uncond.dtype != model_output.dtype:
        return f"model_output_uncond is {model_output_uncond.dtype}, not model_output's {model_output.dtype}"
    tensors = {
        "x": x,
        "model_output": model_output,
        "model_output_uncond": model_output_uncond,
        "x0_prev": x0_prev,
        "noise": noise,
    }
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():
        if name in ("x0_prev", "noise") and tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if tensor.requires_grad and torch.is_grad_enabled():
            return f"{name} requires a gradient, which this backend does not compute"
    return None


def supports_cpp(
    x, model_output, row, *, model_output_uncond, x0_prev, noise, seed, sample_ids, stream
) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on the CPU, not on {x.device}"
    return _native.CPP_MISSING or _supports(x, model_output, model_output_uncond, x0_prev, noise)


def supports_cuda(
    x, model_output, row, *, model_output_uncond, x0_prev, noise, seed, sample_ids, stream
) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on CUDA devices, not on {x.device}"
    return _native.CUDA_MISSING or _supports(x, model_output, model_output_uncond, x0_prev, noise)


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    row: Row,
    *,
    model_output_uncond: Tensor | None,
    x0_prev: Tensor | None,
    noise: Tensor | None,
    seed: int,
    sample_ids,
    stream: int,
) -> tuple[Tensor, Tensor]:
    table = torch.tensor([as_row(row)], dtype=torch.float64, device=x.device)
    counter = torch.tensor([0, signed(seed), stream], dtype=torch.int64, device=x.device)
    ids = sample_ids_tensor(sample_ids, x.shape[0], x.device)
    return torch.ops.fused_diffusion.reverse_step(
        x, model_output, model_output_uncond, x0_prev, noise, table, counter, ids
    )
