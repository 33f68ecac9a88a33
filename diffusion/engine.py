"""Runs a StepTable over a UNet: one evaluation and one `reverse_step` for each row."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import kernels
from .guidance import rescale_guidance
from .steps import StepTable
from .unet import UNet

Noise = Callable[[int], torch.Tensor]
Callback = Callable[[int, torch.Tensor, torch.Tensor], None]
Threshold = Callable[..., tuple[kernels.Row, torch.Tensor, torch.Tensor]]  # thresholding.thresholded_step


@dataclass(frozen=True)
class Batch:
    """The images of one batch, by what makes each of them: its label and where its noise comes from.

    labels: int64 [B] or None, unconditional. sample_ids: int64 [B]. noise: k -> float32 [B, C, H, W], or
    None for the package's own counter-based noise of (seed, sample id, k).
    """

    labels: torch.Tensor | None
    sample_ids: torch.Tensor
    seed: int
    noise: Noise | None


def run(
    unet: UNet,
    table: StepTable,
    batch: Batch,
    shape: tuple[int, int, int],
    *,
    guidance_rescale: float = 0.0,
    threshold: Threshold | None = None,
    backend: str = "auto",
    callback: Callback | None = None,
) -> torch.Tensor:
    """Samples one batch: float32 [B, C, H, W] on the UNet's device.

    The latent stays in float32; the UNet runs in the dtype of its parameters. Where a step's guidance
    scale is 1, or the batch has no labels, the UNet is evaluated once for each image, elsewhere on the
    conditional and the unconditional half together. callback(i, x, x0) follows step i.
    """
    parameter = next(unet.parameters())
    device, dtype = parameter.device, parameter.dtype
    size = (len(batch.sample_ids), *shape)
    if batch.noise is not None:
        x = _injected(batch.noise, 0, size, device)
    else:
        x = kernels.philox_normal(
            size, seed=batch.seed, sample_ids=batch.sample_ids, stream=0, device=device, backend=backend
        )
    x0 = None
    for i in range(len(table)):
        row = table.row(i)
        guided = batch.labels is not None and row.guidance_scale != 1
        output, unconditional = _evaluate(unet, x.to(dtype), row.timestep, batch.labels, guided)
        if not table.learned_variance:  # what lies beyond the image's channels is a variance that is not used
            output = output[:, : shape[0]]
            unconditional = unconditional[:, : shape[0]] if guided else None
        if guided and (guidance_rescale or threshold is not None):
            output = _combined(output, unconditional, row.guidance_scale, guidance_rescale, shape[0])
            unconditional = None
        x0_prev = x0 if row.d else None
        if threshold is not None:
            row, x0_prev, x0 = threshold(row, x, output[:, : shape[0]].float(), x0_prev)
        noise = _injected(batch.noise, i + 1, size, device) if batch.noise is not None and row.s else None
        x, predicted = kernels.reverse_step(
            x,
            output,
            row,
            model_output_uncond=unconditional,
            x0_prev=x0_prev,
            noise=noise,
            seed=batch.seed,
            sample_ids=batch.sample_ids,
            stream=i + 1,
            backend=backend,
        )
        x0 = predicted if threshold is None else x0
        if callback is not None:
            callback(i, x, x0)
    return x


def _evaluate(
    unet: UNet, x: torch.Tensor, timestep: float, labels: torch.Tensor | None, guided: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The UNet's output for x [B, C, H, W], and its unconditional output where the step is guided."""
    if not guided:
        t = torch.full((len(x),), timestep, device=x.device)
        return unet(x, t, labels), None
    t = torch.full((2 * len(x),), timestep, device=x.device)
    null = torch.full_like(labels, unet.config.null_label)
    return unet(torch.cat([x, x]), t, torch.cat([labels, null])).chunk(2)


def _combined(
    output: torch.Tensor, unconditional: torch.Tensor, scale: float, phi: float, channels: int
) -> torch.Tensor:
    """The guided output, rescaled; what lies beyond the image's channels is the conditional variance."""
    conditional, variance = output[:, :channels].float(), output[:, channels:].float()
    unconditional = unconditional[:, :channels].float()
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([rescale_guidance(guided, conditional, phi), variance], dim=1)


def _injected(noise: Noise, k: int, size: tuple[int, ...], device: torch.device) -> torch.Tensor:
    z = noise(k)
    if z.shape != size:
        raise ValueError(f"noise({k}) must have shape {list(size)}, not {list(z.shape)}")
    return z.to(device, torch.float32)
