"""The reverse step in plain PyTorch: the ground truth for every other backend."""

import torch
from torch import Tensor

from ..philox.reference import philox_normal
from .row import Row, as_row


def reverse_step(
    x: Tensor,
    model_output: Tensor,
    row,
    *,
    model_output_uncond: Tensor | None = None,
    x0_prev: Tensor | None = None,
    noise: Tensor | None = None,
    seed: int = 0,
    sample_ids=None,
    stream: int = 0,
) -> tuple[Tensor, Tensor]:
    row = as_row(row)
    channels = x.shape[1]
    out = model_output[:, :channels].to(x.dtype)
    if model_output_uncond is not None:
        uncond = model_output_uncond[:, :channels].to(x.dtype)
        out = uncond + row.guidance_scale * (out - uncond)
    x0 = torch.clamp(row.p_x * x + row.p_o * out, -row.clip, row.clip)
    x_next = row.a * x + row.b * x0 + row.e * out
    if row.d != 0:
        x_next = x_next + row.d * x0_prev
    if row.s != 0:
        if noise is None:
            noise = philox_normal(x.shape, seed=seed, sample_ids=sample_ids, stream=stream, device=x.device)
        sigma = row.s
        if model_output.shape[1] != channels:
            fraction = (model_output[:, channels:].to(x.dtype) + 1) / 2
            sigma = sigma * torch.exp(0.5 * (fraction * row.log_var_max + (1 - fraction) * row.log_var_min))
        x_next = x_next + sigma * noise.to(x.dtype)
    return x_next, x0


def reverse_step_(
    x, model_output, table, counter, *, sample_ids, model_output_uncond, x0, noise, unet_input
) -> None:
    step, seed, stream, _ = counter.tolist()
    if not 0 <= step < len(table):
        raise RuntimeError(f"step {step} is outside of the table's {len(table)}")
    if table[step, Row._fields.index("d")] != 0 and x0 is None:
        raise RuntimeError("row.d is not 0, so the previous x0 is needed")
    x_next, predicted = reverse_step(
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
    x.copy_(x_next)
    if x0 is not None:
        x0.copy_(predicted)
    if unet_input is not None and len(x):
        unet_input.unflatten(0, (-1, len(x))).copy_(x)
    counter[0] += 1
