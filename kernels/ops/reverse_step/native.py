"""The C++ and CUDA reverse step: csrc/reverse_step/, noise included, in one pass."""

from itertools import pairwise

import torch
from torch import Tensor

from ... import _native
from .arguments import Arguments, InPlaceArguments
from .library import in_place_arguments, operator_arguments

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # dtypes of the UNet's input and output


def _has_even_positions(tensor: Tensor) -> bool:
    """Whether one stride leads from each position of [B, C, ...] to the next, as in channels_last."""
    if tensor.is_contiguous():
        return True
    strides = [(s, n) for s, n in zip(tensor.stride()[2:], tensor.shape[2:], strict=True) if n != 1]
    return all(s == below * n for (s, _), (below, n) in pairwise(strides))


def unsupported(arguments: Arguments | InPlaceArguments) -> str | None:
    """Reason no kernel serves these tensors, or None."""
    x, model_output, model_output_uncond = arguments.x, arguments.model_output, arguments.model_output_uncond
    before = ("x0_prev", arguments.x0_prev) if isinstance(arguments, Arguments) else ("x0", arguments.x0)
    differentiable = torch.is_grad_enabled()
    for name, tensor in (("x", x), before, ("noise", arguments.noise)):
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


def unsupported_in_place(arguments: InPlaceArguments) -> str | None:
    """Reason no kernel serves these tensors, or None."""
    unet_input = arguments.unet_input
    if unet_input is not None:
        if unet_input.dtype not in DTYPES:
            return f"unet_input is {unet_input.dtype}, not float32, bfloat16 or float16"
        if not _has_even_positions(unet_input):
            return "unet_input is neither contiguous nor channels_last"
    return unsupported(arguments)


def _without_cpp(device: torch.device) -> str | None:
    return _native.CPP_MISSING if device.type == "cpu" else f"it runs on the CPU, not on {device}"


def _without_cuda(device: torch.device) -> str | None:
    return _native.CUDA_MISSING if device.type == "cuda" else f"it runs on CUDA devices, not on {device}"


def supports_cpp(arguments: Arguments) -> str | None:
    return _without_cpp(arguments.x.device) or unsupported(arguments)


def supports_cuda(arguments: Arguments) -> str | None:
    return _without_cuda(arguments.x.device) or unsupported(arguments)


def supports_cpp_in_place(arguments: InPlaceArguments) -> str | None:
    return _without_cpp(arguments.x.device) or unsupported_in_place(arguments)


def supports_cuda_in_place(arguments: InPlaceArguments) -> str | None:
    return _without_cuda(arguments.x.device) or unsupported_in_place(arguments)


def reverse_step(arguments: Arguments) -> tuple[Tensor, Tensor]:
    return torch.ops.fused_diffusion.reverse_step(*operator_arguments(arguments))


def reverse_step_(arguments: InPlaceArguments) -> None:
    torch.ops.fused_diffusion.reverse_step_(*in_place_arguments(arguments))
    if not torch.compiler.is_compiling():  # a compiled graph knows from the schema what the operator changes
        written = (arguments.x, arguments.x0, arguments.counter, arguments.unet_input)
        changed = [t for t in written if t is not None and not t.is_inference()]
        torch.autograd.graph.increment_version(changed)
