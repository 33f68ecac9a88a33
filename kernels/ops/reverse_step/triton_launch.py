"""The reverse step in Triton: fused_diffusion::reverse_step_triton and, in place, reverse_step_triton_."""

import math

import torch
from torch import Tensor

from ... import _triton
from ..._library import implement
from .arguments import Arguments, InPlaceArguments
from .library import define, in_place_arguments, operator_arguments
from .native import unsupported, unsupported_in_place

BLOCKS = 256  # noise blocks of four elements to a program


def _layout(tensor: Tensor) -> tuple[tuple[int, ...], bool]:
    """Strides of sample, channel and position, and whether a sample's elements are contiguous."""
    flat = tensor.flatten(2) if tensor.ndim > 2 else tensor.unsqueeze(-1)
    _, channels, positions = flat.shape
    sample, channel, position = flat.stride()
    if channels == 1:
        channel = positions * position
    if positions == 1:
        position = 1
    return (sample, channel, position), position == 1 and channel == positions


# x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor, Tensor, Tensor]


def _launch(
    inputs: Inputs, x_next: Tensor, x0: Tensor | None, unet_input: Tensor | None, *, advance: bool
) -> None:
    x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids = inputs
    from .triton_kernels import reverse_step_kernel

    batch, channels = x.shape[:2]
    elements = x.numel() // batch
    tiles = math.ceil(elements / (4 * BLOCKS))
    out_strides, out_linear = _layout(model_output)
    in_strides, in_linear = ((0, 0, 0), True) if unet_input is None else _layout(unet_input)
    learned = model_output.shape[1] != channels
    with torch.cuda.device_of(x):
        reverse_step_kernel[(batch * tiles,)](
            x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids,
            x_next, x0, unet_input, batch, elements, elements // channels, tiles, len(table),
            *out_strides, *in_strides, learned, out_linear, in_linear,
            1 if unet_input is None else len(unet_input) // batch, advance,
            (1 + learned) * tiles * 4 * BLOCKS >= 2**31, BLOCKS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def _reverse_step(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    x0_prev: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    counter: Tensor,
    sample_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    inputs = (x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids)
    x_next, x0 = torch.empty_like(x), torch.empty_like(x)
    if x.numel() > 0:
        _launch(inputs, x_next, x0, None, advance=False)
    return x_next, x0


def _reverse_step_(
    x: Tensor,
    model_output: Tensor,
    model_output_uncond: Tensor | None,
    x0: Tensor | None,
    noise: Tensor | None,
    table: Tensor,
    counter: Tensor,
    sample_ids: Tensor,
    unet_input: Tensor | None,
) -> None:
    if x.numel() > 0:
        inputs = (x, model_output, model_output_uncond, x0, noise, table, counter, sample_ids)
        _launch(inputs, x, x0, unet_input, advance=True)
    else:
        counter[:1] += 1  # an empty batch still has its step


define("reverse_step_triton")
implement("reverse_step_triton", _reverse_step)
implement("reverse_step_triton_", _reverse_step_)


def supports(arguments: Arguments) -> str | None:
    return _triton.unsupported(arguments.x.device) or unsupported(arguments)


def supports_in_place(arguments: InPlaceArguments) -> str | None:
    return _triton.unsupported(arguments.x.device) or unsupported_in_place(arguments)


def reverse_step(arguments: Arguments) -> tuple[Tensor, Tensor]:
    return torch.ops.fused_diffusion.reverse_step_triton(*operator_arguments(arguments))


def reverse_step_(arguments: InPlaceArguments) -> None:
    torch.ops.fused_diffusion.reverse_step_triton_(*in_place_arguments(arguments))
