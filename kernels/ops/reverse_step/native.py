"""The C++ and CUDA reverse step: csrc/reverse_step/, noise included, in one pass."""

from itertools import pairwise

import torch
from torch import Tensor

from ... import _native
from ..philox.native import sample_ids_tensor, signed
from .coefficients import StepCoefficients, as_coefficients

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the UNet's input and output

# table: float64 [rows, 12]. counter: int64 [4], (step, seed, stream of step 0, 0). Both are on x's device:
# the row is table[step] and the noise stream is stream + step, so that one CUDA graph serves every step. The
# last entry counts CUDA blocks within a call.
SCHEMA = (
    "(Tensor x, Tensor model_output, Tensor? model_output_uncond, Tensor? x0_prev, Tensor? noise, "
    "Tensor table, Tensor counter, Tensor sample_ids) -> (Tensor, Tensor)"
)
SCHEMA_IN_PLACE = (
    "(Tensor(a!) x, Tensor model_output, Tensor? model_output_uncond, Tensor(b!)? x0, Tensor? noise, "
    "Tensor table, Tensor(c!) counter, Tensor sample_ids, Tensor(d!)? unet_input) -> ()"
)


def define(name: str) -> None:
    """Defines fused_diffusion::<name> and, in place, fused_diffusion::<name>_, as yet without kernels."""
    torch.library.define(f"fused_diffusion::{name}", SCHEMA)
    torch.library.define(f"fused_diffusion::{name}_", SCHEMA_IN_PLACE)
    torch.library.register_fake(f"fused_diffusion::{name}", _fake)
    torch.library.register_fake(f"fused_diffusion::{name}_", _fake_in_place)


def _fake(x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids):
    return torch.empty_like(x), torch.empty_like(x)


def _fake_in_place(
    x, model_output, model_output_uncond, x0, noise, table, counter, sample_ids, unet_input
) -> None:
    return None


define("reverse_step")


def _has_even_positions(tensor: Tensor) -> bool:
    """Whether the positions of [B, C, ...] lie at one distance, as in a contiguous or channels_last one."""
    if tensor.is_contiguous():
        return True
    strides = [(s, n) for s, n in zip(tensor.stride()[2:], tensor.shape[2:], strict=True) if n != 1]
    return all(s == below * n for (s, _), (below, n) in pairwise(strides))


def unsupported(x, model_output, model_output_uncond, **images) -> str | None:
    """`images`: the other tensors of x's shape, dtype and layout."""
    differentiable = torch.is_grad_enabled()
    for name, tensor in (("x", x), *images.items()):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}, not float32"
        if not tensor.is_contiguous():
            return f"{name} is not contiguous"
        if differentiable and tensor.requires_grad:
            return f"{name} requires a gradient, which this backend does not compute"
    if model_output.dtype not in DTYPES:
        return f"model_output is {model_output.dtype}, not float32, bfloat16 or float16"
    if not _has_even_positions(model_output):
        return "model_output is neither contiguous nor channels_last"
    if differentiable and model_output.requires_grad:
        return "model_output requires a gradient, which this backend does not compute"
    if model_output_uncond is not None:
        if model_output_uncond.dtype != model_output.dtype:
            return (
                f"model_output_uncond is {model_output_uncond.dtype}, not model_output's {model_output.dtype}"
            )
        if model_output_uncond.stride() != model_output.stride():
            return "model_output_uncond and model_output differ in their strides"
        if differentiable and model_output_uncond.requires_grad:
            return "model_output_uncond requires a gradient, which this backend does not compute"
    return None


def supports_cpp(
    x, model_output, row, *, model_output_uncond, x0_prev, noise, seed, sample_ids, stream
) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on the CPU, not on {x.device}"
    return _native.CPP_MISSING or unsupported(
        x, model_output, model_output_uncond, x0_prev=x0_prev, noise=noise
    )


def supports_cuda(
    x, model_output, row, *, model_output_uncond, x0_prev, noise, seed, sample_ids, stream
) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on CUDA devices, not on {x.device}"
    return _native.CUDA_MISSING or unsupported(
        x, model_output, model_output_uncond, x0_prev=x0_prev, noise=noise
    )


def step_counter(seed: int, stream: int, device) -> Tensor:
    return torch.tensor([0, signed(seed), stream, 0], dtype=torch.int64, device=device)


def arguments(
    x: Tensor,
    model_output: Tensor,
    row: StepCoefficients,
    *,
    model_output_uncond: Tensor | None,
    x0_prev: Tensor | None,
    noise: Tensor | None,
    seed: int,
    sample_ids,
    stream: int,
) -> tuple:
    """The operator's arguments, from those of the public function."""
    table = torch.tensor([as_coefficients(row)], dtype=torch.float64, device=x.device)
    counter = step_counter(seed, stream, x.device)
    ids = sample_ids_tensor(sample_ids, x.shape[0], x.device)
    return x, model_output, model_output_uncond, x0_prev, noise, table, counter, ids


def reverse_step(x: Tensor, model_output: Tensor, row: StepCoefficients, **options) -> tuple[Tensor, Tensor]:
    return torch.ops.fused_diffusion.reverse_step(*arguments(x, model_output, row, **options))


def unsupported_in_place(x, model_output, model_output_uncond, x0, noise, unet_input) -> str | None:
    if unet_input is not None:
        if unet_input.dtype not in DTYPES:
            return f"unet_input is {unet_input.dtype}, not float32, bfloat16 or float16"
        if not _has_even_positions(unet_input):
            return "unet_input is neither contiguous nor channels_last"
    return unsupported(x, model_output, model_output_uncond, x0=x0, noise=noise)


def supports_cpp_in_place(
    x, model_output, table, counter, *, sample_ids, model_output_uncond, x0, noise, unet_input
) -> str | None:
    if x.device.type != "cpu":
        return f"it runs on the CPU, not on {x.device}"
    return _native.CPP_MISSING or unsupported_in_place(
        x, model_output, model_output_uncond, x0, noise, unet_input
    )


def supports_cuda_in_place(
    x, model_output, table, counter, *, sample_ids, model_output_uncond, x0, noise, unet_input
) -> str | None:
    if x.device.type != "cuda":
        return f"it runs on CUDA devices, not on {x.device}"
    return _native.CUDA_MISSING or unsupported_in_place(
        x, model_output, model_output_uncond, x0, noise, unet_input
    )


def reverse_step_(
    x, model_output, table, counter, *, sample_ids, model_output_uncond, x0, noise, unet_input
) -> None:
    torch.ops.fused_diffusion.reverse_step_(
        x, model_output, model_output_uncond, x0, noise, table, counter, sample_ids, unet_input
    )
    if not torch.compiler.is_compiling():  # whose graphs know what the operator changes
        changed = [t for t in (x, x0, counter, unet_input) if t is not None and not t.is_inference()]
        torch.autograd.graph.increment_version(changed)
