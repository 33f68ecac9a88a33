"""A batch on its way through a step table, in buffers, so that a CUDA graph can hold a step."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from .. import kernels
from ..kernels.ops.reverse_step.in_place import op as reverse_step_op
from ..models.unet import UNet
from ..samplers import StepTable
from ..samplers.guidance import rescale_guidance
from ..utils.validation import check_dense

STEPS_EMBEDDED = 64  # at a time

Noise = Callable[[int], torch.Tensor]
Threshold = Callable[
    ..., tuple[kernels.StepCoefficients, torch.Tensor, torch.Tensor]
]  # thresholding.thresholded_step


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
    """What a chain runs over. embed: as UNet.embed. denoise: as UNet.denoise, for inputs in `dtype`.

    embedding_size: what embed gives for an image. backend: of all kernels. forward: called instead of
    `denoise(x, embed(timesteps, labels))`, every time: no step is captured, nothing embedded ahead.
    """

    embed: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor] | None
    denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    embedding_size: int
    null_label: int | None
    device: torch.device
    dtype: torch.dtype
    backend: str = "auto"
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor] | None = None
    _own: threading.local = field(default_factory=threading.local)  # each thread has buffers of its own

    @classmethod
    def of(cls, unet: UNet, backend: str = "auto") -> "Network":
        """The UNet as it is."""
        parameter = next(unet.parameters())

        def denoise(x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
            return unet.denoise(x, embedding, backend)

        size, null = sum(unet.embedding_sizes), unet.config.null_label
        return cls(unet.embed, denoise, size, null, parameter.device, parameter.dtype, backend)

    @classmethod
    def whole(
        cls,
        forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
        null_label: int | None,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
    ) -> "Network":
        """A network of which nothing is known but what it is called with: x, timesteps and labels."""
        return cls(None, None, 0, null_label, device, dtype, backend, forward)

    def __call__(self, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """As UNet.forward."""
        if self.forward is not None:
            return self.forward(x, timesteps, labels)
        return self.denoise(x, self.embed(timesteps, labels))

    @contextmanager
    def chain(self, *key) -> Iterator["Chain"]:
        """The chain for `Chain`'s further arguments, with the graphs that it captured when it ran before.

        While it is in use, this thread's further calls, such as those of a callback, get chains of their own.
        """
        kept, self._own.kept = getattr(self._own, "kept", None), None
        if kept is None or kept[0] != key:
            kept = None  # frees the memory first
            with torch.inference_mode(False):
                kept = (key, Chain(self, *key))
        try:
            yield kept[1]
        finally:
            self._own.kept = kept


class Chain:
    """The latents of a batch and all that a step reads, in buffers that stay where they are.

    shape: [C, H, W]. count: images. labels: distinct ones, the null label included. steps: rows of the table.
    learned_variance: see StepTable. keeps_x0: whether the predicted x0 is kept, for the next step or a
    callback. injected: whether the caller gives the noise.
    """

    def __init__(
        self,
        network: Network,
        shape: tuple[int, int, int],
        count: int,
        labels: int,
        steps: int,
        learned_variance: bool,
        keeps_x0: bool,
        injected: bool,
    ):
        self.network, self.channels, self.count = network, shape[0], count
        self.learned_variance, device = learned_variance, network.device
        self.x = torch.zeros(count, *shape, device=device, dtype=torch.float32)
        self.x0 = torch.zeros_like(self.x) if keeps_x0 else None
        self.noise = torch.zeros_like(self.x) if injected else None
        inputs = torch.zeros(2 * count, *shape, device=device, dtype=network.dtype)
        self.inputs = inputs.contiguous(memory_format=torch.channels_last)
        self.rows = torch.zeros(
            steps, len(kernels.StepCoefficients._fields), dtype=torch.float64, device=device
        )
        self.counter = kernels.step_counter(0, device=device)
        self.ids = torch.zeros(count, dtype=torch.int64, device=device)
        self.positions = torch.zeros(2 * count, dtype=torch.int64, device=device)
        size = (STEPS_EMBEDDED, labels, network.embedding_size)
        precise = torch.float64 if network.dtype == torch.float64 else torch.float32
        self.embeddings = torch.zeros(size, device=device, dtype=precise)
        self._graphs: dict[tuple, Callable[[], None]] = {}
        self._captures = device.type == "cuda" and self._step_backend() != "reference"

    def _step_backend(self) -> str:
        return reverse_step_op.choose(
            self.network.backend,
            self.x,
            self.inputs[: self.count, : self.channels],
            self.rows,
            self.counter,
            sample_ids=self.ids,
            model_output_uncond=None,
            x0=self.x0,
            noise=self.noise,
            unet_input=self.inputs,
        )

    # ---- Filling the buffers.

    def begin(self, table: StepTable, batch: Batch, guided: bool) -> None:
        """Takes up a batch: its initial noise, its labels, its table."""
        network, size = self.network, self.x.shape
        self.rows.copy_(table.table)
        self.counter.copy_(kernels.step_counter(batch.seed, stream=1))
        self.ids.copy_(batch.sample_ids)
        self.timesteps = table.table[:, kernels.StepCoefficients._fields.index("timestep")].float()
        self.integral = bool((self.timesteps == self.timesteps.round()).all())
        self.labels: list[int | None] = [None]
        self.image_labels = batch.labels
        if batch.labels is not None and guided:
            self.image_labels = torch.cat([batch.labels, torch.full_like(batch.labels, network.null_label)])
        if batch.labels is not None:
            distinct, positions = batch.labels.cpu().unique(return_inverse=True)
            self.labels = distinct.tolist() + [network.null_label] * guided
            self.positions.copy_(torch.cat([positions, torch.full_like(positions, len(distinct))]))
        if batch.noise is not None:
            self.x.copy_(injected(batch.noise, 0, size))
        else:
            self.x.copy_(
                kernels.philox_normal(
                    size,
                    seed=batch.seed,
                    sample_ids=self.ids,
                    stream=0,
                    device=network.device,
                    backend=network.backend,
                )
            )
        self.inputs.unflatten(0, (2, self.count)).copy_(self.x)

    def embed(self, i: int) -> None:
        """Before step i: what depends on timestep and label alone, for this step and those that follow.

        Each label is embedded on its own, so that no image depends on the others of its batch.
        """
        if i % STEPS_EMBEDDED == 0 and self.network.forward is None:
            timesteps = self.timesteps[i : i + STEPS_EMBEDDED].to(self.network.device)
            for position, label in enumerate(self.labels):
                same = None if label is None else torch.full_like(timesteps, label, dtype=torch.int64)
                self.embeddings[: len(timesteps), position].copy_(self.network.embed(timesteps, same))

    # ---- Steps.

    def advance(self, now: bool, following: bool | None, noisy: bool) -> None:
        """A step. now, following: whether it and the next one are guided; None: there is no next one.

        noisy: whether it takes injected noise, which is in `noise`. On a CUDA device the step is captured the
        first time, and replayed from then on; nothing waits for the device.
        """
        key = (now, following, noisy)
        if not self._captures or self.network.forward is not None:
            return self._step(*key)
        if key not in self._graphs:
            changed = [self.x, self.inputs, self.counter, *([] if self.x0 is None else [self.x0])]
            self._graphs[key] = captured(partial(self._step, *key), changed)
        return self._graphs[key]()

    def _evaluate(self, guided: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The network's output, and the unconditional one where the step is guided."""
        images = 2 * self.count if guided else self.count
        if self.network.forward is None:
            embedding = self.embeddings.index_select(0, self.counter[:1] % STEPS_EMBEDDED)[0]
            embedding = embedding.index_select(0, self.positions[:images])
            output = self.network.denoise(self.inputs[:images], embedding)
        else:
            output = self._forward(images)
        if not self.learned_variance:  # what lies beyond the image's channels is a variance that is not used
            output = output[:, : self.channels]
        return output.chunk(2) if guided else (output, None)

    def _forward(self, images: int) -> torch.Tensor:
        """By a network that is called whole, with tensors that it may keep."""
        timesteps = self.rows[:, kernels.StepCoefficients._fields.index("timestep")]
        timesteps = timesteps.index_select(0, self.counter[:1]).expand(images).clone()
        timesteps = timesteps.long() if self.integral else timesteps.float()
        labels = None if self.image_labels is None else self.image_labels[:images].clone()
        return self.network.forward(self.inputs[:images].clone(), timesteps, labels)

    def _following(self, guided: bool | None) -> torch.Tensor | None:
        return None if guided is None else self.inputs[: 2 * self.count if guided else self.count]

    def _step(self, now: bool, following: bool | None, noisy: bool) -> None:
        self._reverse(*self._evaluate(now), following, noisy)

    def _reverse(
        self, output: torch.Tensor, unconditional: torch.Tensor | None, following: bool | None, noisy: bool
    ) -> None:
        kernels.reverse_step_(
            self.x,
            output,
            self.rows,
            self.counter,
            sample_ids=self.ids,
            model_output_uncond=unconditional,
            x0=self.x0,
            noise=self.noise if noisy else None,
            unet_input=self._following(following),
            backend=self.network.backend,
        )

    def advance_modified(
        self,
        row: kernels.StepCoefficients,
        now: bool,
        following: bool | None,
        noisy: bool,
        rescale: float,
        threshold: Threshold | None,
        **noise,
    ) -> None:
        """A step whose guided prediction is rescaled, or whose x0 is thresholded, which no row can say.

        noise: seed and stream of the step, as `kernels.reverse_step` takes them.
        """
        output, unconditional = self._evaluate(now)
        if now:
            output = combined(output, unconditional, row.guidance_scale, rescale, self.channels)
        if threshold is None:
            return self._reverse(output, None, following, noisy)
        before = self.x0 if row.coef_x0_prev else None
        row, before, predicted = threshold(row, self.x, output[:, : self.channels].float(), before)
        x, _ = kernels.reverse_step(
            self.x,
            output,
            row,
            x0_prev=before,
            noise=self.noise if noisy else None,
            sample_ids=self.ids,
            backend=self.network.backend,
            **noise,
        )
        self.x.copy_(x)
        if self.x0 is not None:
            self.x0.copy_(predicted)
        self.counter[0] += 1
        if following is not None:
            self._following(following).unflatten(0, (-1, self.count)).copy_(x)
        return None


def captured(function: Callable[[], None], changed: list[torch.Tensor]) -> Callable[[], None]:
    """`function` as a CUDA graph to replay. It runs twice before, on another stream, as PyTorch asks for.

    changed: what it changes, which is put back.
    """
    kept = [tensor.clone() for tensor in changed]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, before in zip(changed, kept, strict=True):
        tensor.copy_(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def combined(
    output: torch.Tensor, unconditional: torch.Tensor, scale: float, phi: float, channels: int
) -> torch.Tensor:
    """The guided output, rescaled; what lies beyond the image's channels is the conditional variance."""
    conditional, variance = output[:, :channels].float(), output[:, channels:].float()
    unconditional = unconditional[:, :channels].float()
    guided = unconditional + scale * (conditional - unconditional)
    return torch.cat([rescale_guidance(guided, conditional, phi), variance], dim=1)


def injected(noise: Noise, k: int, size: tuple[int, ...]) -> torch.Tensor:
    """noise(k), or ValueError."""
    return check_dense(f"noise({k})", noise(k), size)
