"""The reverse step in plain PyTorch, the truth for every other backend."""

import torch
from torch import Tensor

from ..philox.arguments import Arguments as PhiloxArguments
from ..philox.reference import philox_normal
from .arguments import Arguments, InPlaceArguments
from .coefficients import StepCoefficients, as_coefficients


def reverse_step(arguments: Arguments) -> tuple[Tensor, Tensor]:
    x, model_output, row, model_output_uncond, x0_prev, noise, seed, sample_ids, stream = arguments
    row = as_coefficients(row)
    channels = x.shape[1]
    out = model_output[:, :channels].to(x.dtype)
    if model_output_uncond is not None:
        uncond = model_output_uncond[:, :channels].to(x.dtype)
        out = uncond + row.guidance_scale * (out - uncond)
    x0 = torch.clamp(row.x0_from_x * x + row.x0_from_output * out, -row.clip_x0, row.clip_x0)
    x_next = row.coef_x * x + row.coef_x0 * x0 + row.coef_output * out
    if row.coef_x0_prev != 0:
        assert x0_prev is not None  # by `validate`
        x_next = x_next + row.coef_x0_prev * x0_prev
    if row.sigma != 0:
        if noise is None:
            noise = philox_normal(PhiloxArguments(x.shape, seed, sample_ids, stream, x.device))
        sigma: float | Tensor = row.sigma
        if model_output.shape[1] != channels:
            fraction = (model_output[:, channels:].to(x.dtype) + 1) / 2
            sigma = sigma * torch.exp(0.5 * (fraction * row.log_var_max + (1 - fraction) * row.log_var_min))
        x_next = x_next + sigma * noise.to(x.dtype)
    return x_next, x0


def reverse_step_(arguments: InPlaceArguments) -> None:
    x, model_output, table, counter, sample_ids, model_output_uncond, x0, noise, unet_input = arguments
    step, seed, stream, _ = counter.tolist()
    if not 0 <= step < len(table):
        raise RuntimeError(f"step {step} is outside of the table's {len(table)}")
    if table[step, StepCoefficients._fields.index("coef_x0_prev")] != 0 and x0 is None:
        raise RuntimeError("row.coef_x0_prev is not 0, so the previous x0 is needed")
    x_next, predicted = reverse_step(
        Arguments(
            x,
            model_output,
            table[step],
            model_output_uncond=model_output_uncond,
            x0_prev=x0,
            noise=noise,
            seed=seed % 2**64,
            sample_ids=sample_ids,
            stream=(stream + step) % 2**32,
        )
    )
    x.copy_(x_next)
    if x0 is not None:
        x0.copy_(predicted)
    if unet_input is not None and len(x):
        unet_input.unflatten(0, (-1, len(x))).copy_(x)
    counter[0] += 1
