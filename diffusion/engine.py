"""Runs a StepTable over a UNet: one evaluation and one reverse step for each row, in buffers made once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import kernels
from .guidance import rescale_guidance
from .steps import StepTable
from .unet import UNet

STEPS_EMBEDDED = 64  # at a time

Noise = Callable[[int], torch.Tensor]
Callback = Callable[[int, torch.Tensor, torch.Tensor], None]
Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # UNet.denoise
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


@dataclass(frozen=True)
class Network:
    """What the chain runs over. embed: as UNet.embed. denoise: as UNet.denoise, for inputs in `dtype`."""

    embed: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    denoise: Denoise
    null_label: int | None
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, unet: UNet, backend: str = "auto") -> "Network":
        """The UNet as it is, with a backend for its kernels."""
        parameter = next(unet.parameters())

        def denoise(x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
            return unet.denoise(x, embedding, backend)

        return cls(unet.embed, denoise, unet.config.null_label, parameter.device, parameter.dtype)


def run(
    network: Network,
    table: StepTable,
    batch: Batch,
    shape: tuple[int, int, int],
    *,
    guidance_rescale: float = 0.0,
    threshold: Threshold | None = None,
    backend: str = "auto",
    callback: Callback | None = None,
    progress: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Samples one batch: float32 [B, C, H, W] on the network's device.

    The latent stays in float32. Where a step's guidance scale is 1, or the batch has no labels, the network
    is evaluated once for each image, elsewhere on the conditional and the unconditional half together. What
    depends on timestep and label alone is computed once for all steps and images. callback(i, x, x0) follows
    step i; its tensors are its own. progress() follows each step.
    """
    count, device = len(batch.sample_ids), network.device
    scales, deviations = table.column("guidance_scale"), table.column("s")
    guided = [batch.labels is not None and scale != 1 for scale in scales]
    rows_of = [2 * count if g else count for g in guided]
    embeddings = _Embeddings(network, table, batch.labels, count, any(guided))
    size = (count, *shape)
    ids = batch.sample_ids.to(device)
    if batch.noise is not None:
        x = _injected(batch.noise, 0, size, device)
    else:
        x = kernels.philox_normal(
            size, seed=batch.seed, sample_ids=ids, stream=0, device=device, backend=backend
        )
    x = x.clone(memory_format=torch.contiguous_format)
    x0 = torch.zeros_like(x) if table.needs_x0_prev or callback is not None else None
    inputs = torch.empty(max(rows_of), *shape, device=device, dtype=network.dtype)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    inputs[: rows_of[0]].unflatten(0, (-1, count)).copy_(x)
    rows, counter = table.table.to(device), kernels.step_counter(batch.seed, stream=1, device=device)
    for i in range(len(table)):
        output = network.denoise(inputs[: rows_of[i]], embeddings.of_step(i, guided[i]))
        if not table.learned_variance:  # what lies beyond the image's channels is a variance that is not used
            output = output[:, : shape[0]]
        output, unconditional = output.chunk(2) if guided[i] else (output, None)
        following = inputs[: rows_of[i + 1]] if i + 1 < len(table) else None
        noise = None
        if batch.noise is not None and deviations[i]:
            noise = _injected(batch.noise, i + 1, size, device)
        if guided[i] and (guidance_rescale or threshold is not None):
            output = _combined(output, unconditional, scales[i], guidance_rescale, shape[0])
            unconditional = None
        if threshold is None:
            kernels.reverse_step_(
                x,
                output,
                rows,
                counter,
                sample_ids=ids,
                model_output_uncond=unconditional,
                x0=x0,
                noise=noise,
                unet_input=following,
                backend=backend,
            )
        else:
            row, x0_prev, predicted = threshold(
                table.row(i), x, output[:, : shape[0]].float(), x0 if table.row(i).d else None
            )
            x, _ = kernels.reverse_step(
                x,
                output,
                row,
                x0_prev=x0_prev,
                model_output_uncond=unconditional,
                noise=noise,
                seed=batch.seed,
                sample_ids=ids,
                stream=i + 1,
                backend=backend,
            )
            x0 = predicted
            if following is not None:
                following.unflatten(0, (-1, count)).copy_(x)
        if callback is not None:
            callback(i, x.clone(), x0.clone())
        if progress is not None:
            progress()
    return x


class _Embeddings:
    """`embed` for each step and label, some steps at a time: [B, E], or [2 B, E] where a step is guided.

    Each label is embedded on its own, so that no image depends on the others of its batch.
    """

    def __init__(
        self, network: Network, table: StepTable, labels: torch.Tensor | None, count: int, guided: bool
    ):
        self.network, self.timesteps = network, table.table[:, 0].to(network.device, torch.float32)
        self.labels: list[int | None] = [None]
        position = torch.zeros(count, dtype=torch.int64)
        if labels is not None:
            distinct, position = labels.cpu().unique(return_inverse=True)
            self.labels = distinct.tolist()
        self.rows = {False: position.to(network.device)}
        if guided:
            null = torch.full_like(position, len(self.labels))
            self.labels.append(network.null_label)
            self.rows[True] = torch.cat([position, null]).to(network.device)
        self.first, self.chunk = 0, None

    def of_step(self, i: int, guided: bool) -> torch.Tensor:
        if self.chunk is None or i >= self.first + self.chunk.shape[1]:
            self.first = i
            timesteps = self.timesteps[i : i + STEPS_EMBEDDED]
            self.chunk = torch.stack([self._embed(timesteps, label) for label in self.labels])
        return self.chunk[:, i - self.first][self.rows[guided]]

    def _embed(self, timesteps: torch.Tensor, label: int | None) -> torch.Tensor:
        if label is None:
            return self.network.embed(timesteps, None)
        return self.network.embed(timesteps, torch.full_like(timesteps, label, dtype=torch.int64))


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
    return z.to(device, torch.float32).contiguous()
