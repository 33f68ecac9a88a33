"""SamplerBuffers: the tensors of one batch while it is sampled.

They keep their addresses, so that a step can be captured, as a CUDA graph or as recorded calls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .. import kernels
from ..kernels.ops.reverse_step import ROW_LENGTH
from ..kernels.ops.reverse_step.library import step_embeddings_
from ..models.network import NetworkConfig
from ..planner.graph import channels_last_strides
from ..samplers.table import StepTable
from ..samplers.thresholding import THRESHOLDED, Threshold
from ..utils.validation import check_dense, check_finite

STEPS_EMBEDDED = 64  # steps whose timesteps are embedded together
TIMESTEP = kernels.StepCoefficients._fields.index("timestep")

Noise = Callable[[int], torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """The images of one batch: the label of each, the source of its noise, and what it starts from.

    labels: int64 [B], best on the CPU, or None to sample without labels. sample_ids: int64 [B]. noise: k ->
    float32 [B, C, H, W], or None for the package's counter-based noise of (seed, sample id, k).
    initial: float32 [B, C, H, W], the initial noise instead of that of k = 0.
    image: float32 [B, C, H, W] in the range that is diffused: the first step starts from it with noise.
    mask: float32 [B, 1, H, W], 1 where an image is painted anew, 0 where it is known. from_noise: the first
    step starts from noise alone, and the image serves the mask only.
    """

    labels: torch.Tensor | None
    sample_ids: torch.Tensor
    seed: int
    noise: Noise | None = None
    initial: torch.Tensor | None = None
    image: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    from_noise: bool = False


class Step(NamedTuple):
    """How one step runs. Steps that are equal share a capture.

    guided: the UNet evaluates the conditional and the unconditional half of the batch. next_guided: the same
    for the next step, whose UNet input this step writes; the last step counts as followed by its like.
    injects_noise: the caller gives the noise. learned_variance: the UNet's second half of channels is the
    variance of the step. rescale, parallel: phi of `rescale_guidance` and the share of `project_guidance`, of
    a guided step. threshold: takes the place of the step's clipping.
    """

    guided: bool
    next_guided: bool
    injects_noise: bool
    learned_variance: bool
    rescale: float = 0.0
    parallel: float = 1.0
    threshold: Threshold | None = None

    @property
    def corrected(self) -> bool:
        """Whether PyTorch computes between the UNet and the reverse step."""
        return (self.rescale, self.parallel, self.threshold) != (0, 1, None)


@dataclass(frozen=True)
class BufferSpec:
    """The sizes of the buffers.

    image_shape: (C, H, W).
    batch_size: B.
    num_labels: distinct labels, the null label included where a step is guided; 1 without labels.
    num_steps: rows of the table.
    store_x0: whether the predicted x_0 is kept, for the next step, the network or a callback.
    injects_noise: whether the caller gives the noise.
    thresholds: whether the steps have a threshold.
    """

    image_shape: tuple[int, ...]
    batch_size: int
    num_labels: int
    num_steps: int
    store_x0: bool
    injects_noise: bool
    thresholds: bool = False


class SamplerBuffers:
    """The tensors that the steps of a batch read and write.

    x: x_t, float32 [B, C, H, W].
    x0: the predicted x_0 of the last step, 0 before the first, like x; None unless the spec says store_x0.
    noise: the caller's noise of this step, like x; None unless the spec says injects_noise.
    unet_input: x_t twice, [2 B, C, H, W] in the dtype of the UNet, channels_last. Steps without guidance read
        and write the first half.
    table, counter, sample_ids: as `kernels.reverse_step_` takes them. thresholded: the table of steps with a
        threshold (`samplers.thresholding.thresholded_step`); None unless the spec says thresholds.
    embeddings: [STEPS_EMBEDDED, labels, E], the embedding of each timestep and distinct label.
    label_index: int64 [2 B], the position in `embeddings` of the label of each image of unet_input.
    captured: the steps that were captured over these buffers; each is called with a number of times. None for
        a step that cannot be captured.
    graph_pool: the memory that all CUDA graphs among them share; None before the first.
    """

    def __init__(self, spec: BufferSpec, embedding_size: int, device: torch.device, dtype: torch.dtype):
        self.batch_size = batch = spec.batch_size
        self.steps_embedded = STEPS_EMBEDDED
        self.x = torch.zeros(batch, *spec.image_shape, device=device, dtype=torch.float32)
        self.x0 = torch.zeros_like(self.x) if spec.store_x0 else None
        self.noise = torch.zeros_like(self.x) if spec.injects_noise else None
        inputs = torch.zeros(2 * batch, *spec.image_shape, device=device, dtype=dtype)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        if device.type == "cuda":  # the strides of one channel would be those of no layout in particular
            strides = channels_last_strides(inputs.shape)
            inputs = torch.empty_strided(inputs.shape, strides, device=device, dtype=dtype).zero_()
        self.unet_input = inputs
        self._half = self.unet_input[:batch]
        self.table = torch.zeros(spec.num_steps, ROW_LENGTH, dtype=torch.float64, device=device)
        self.thresholded = torch.zeros_like(self.table) if spec.thresholds else None
        self.counter = kernels.step_counter(0, device=device)
        self.sample_ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.label_index = torch.zeros(2 * batch, dtype=torch.int64, device=device)
        self.embeddings = torch.zeros(
            (self.steps_embedded, spec.num_labels, embedding_size),
            device=device,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        )
        self.embedded: int | None = None  # the first step whose timestep `embeddings` holds
        self._embedding = self.embeddings.new_zeros(2 * batch, embedding_size)  # of this step
        self.captured: dict[Step, Callable[[int], None] | None] = {}
        self.graph_pool: Any = None

    def load(
        self, batch: Batch, table: StepTable, guided: bool, null_label: int | None, backend: str
    ) -> None:
        """Loads the table, labels, sample ids and initial noise of a batch.

        guided: whether any step is guided, by null_label. backend: of the kernel that draws the noise.
        """
        self.table.copy_(table.table)
        if self.thresholded is not None:
            self.thresholded.copy_(_thresholded(table.table))
        self.counter.copy_(kernels.step_counter(batch.seed, stream=1))
        self.sample_ids.copy_(batch.sample_ids)
        if self.x0 is not None:
            self.x0.zero_()
        self.embedded = None
        timesteps = table.table[:, TIMESTEP].float()
        self.whole_timesteps = bool((timesteps == timesteps.round()).all())
        self.timesteps = timesteps.to(self.x.device)
        self._load_labels(batch.labels, guided, null_label)
        noise = self.draw(batch, 0, backend) if batch.initial is None else batch.initial
        if batch.image is None or batch.from_noise:
            self.set_x(noise * table.initial_scale if table.initial_scale != 1 else noise)
        else:
            self.set_x(table.alphas[0].item() * batch.image + table.sigmas[0].item() * noise.to(self.x))

    def draw(self, batch: Batch, k: int, backend: str) -> torch.Tensor:
        """The noise number k of a batch, [B, C, H, W]. backend: of the kernel that draws it."""
        if batch.noise is not None:
            return checked_noise(batch.noise, k, self.x.shape)
        return kernels.philox_normal(
            self.x.shape,
            seed=batch.seed,
            sample_ids=self.sample_ids,
            stream=k,
            device=self.x.device,
            backend=backend,
        )

    def set_x(self, x: torch.Tensor) -> None:
        """Sets x, and the input that the next step's UNet gets."""
        self.x.copy_(x)
        self.unet_input.unflatten(0, (2, self.batch_size)).copy_(self.x)

    def _load_labels(self, labels: torch.Tensor | None, guided: bool, null_label: int | None) -> None:
        """Sets distinct_labels; label_index; and image_labels, the labels of unet_input."""
        self.distinct_labels: list[int | None] = [None]
        self.image_labels: torch.Tensor | None = None
        if labels is None:
            return
        labels = labels.cpu()
        distinct, index = labels.unique(return_inverse=True)
        self.distinct_labels = distinct.tolist() + [null_label] * guided
        self.label_index.copy_(torch.cat([index, torch.full_like(index, len(distinct))]))
        if guided and null_label is not None:
            labels = torch.cat([labels, torch.full_like(labels, null_label)])
        self.image_labels = labels.to(self.x.device)

    def inputs(self, guided: bool) -> torch.Tensor:
        """The part of unet_input that a step reads: all of it, or the first half without guidance."""
        return self.unet_input if guided else self._half

    def step_embedding(self, images: int, compiled: bool) -> torch.Tensor:
        """The embedding [images, E] of this step's timestep and the label of each image of unet_input.

        compiled: by an operator that can be recorded, into a buffer that the next call overwrites.
        """
        index = self.label_index[:images]
        if compiled:
            out = self._embedding[:images]
            step_embeddings_(self.embeddings, self.counter, index, out)
            return out
        now = self.counter[:1] % self.steps_embedded
        return self.embeddings.index_select(0, now)[0].index_select(0, index)

    def row(self) -> kernels.StepCoefficients:
        """This step's row of the table, of tensors without dimensions on the device."""
        now = self.counter[:1].clamp(max=len(self.table) - 1)  # a capture's warm-up may go beyond the last
        return kernels.StepCoefficients(*self.table.index_select(0, now)[0])

    def timesteps_and_labels(self, images: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Copies of this step's timestep [images], int64 if all are whole numbers, and labels [images]."""
        timesteps = self.table[:, TIMESTEP].index_select(0, self.counter[:1]).expand(images).clone()
        labels = None if self.image_labels is None else self.image_labels[:images].clone()
        return timesteps.long() if self.whole_timesteps else timesteps.float(), labels

    def changed_by_a_step(self) -> list[torch.Tensor]:
        """The buffers that a step writes."""
        return [self.x, self.unet_input, self.counter, *([] if self.x0 is None else [self.x0])]


def _thresholded(rows: torch.Tensor) -> torch.Tensor:
    """A copy of the table's rows with the coefficients of `thresholded_step`."""
    rows = rows.clone()
    for name, value in THRESHOLDED.items():
        rows[:, kernels.StepCoefficients._fields.index(name)] = value
    return rows


def checked_noise(noise: Noise, k: int, shape: torch.Size) -> torch.Tensor:
    """noise(k). ValueError unless it is a tensor of finite numbers of this shape."""
    return check_finite(f"noise({k})", check_dense(f"noise({k})", noise(k), shape))


def drawn_first(noise: Noise, config: NetworkConfig) -> tuple[Noise, tuple[int, int, int] | None]:
    """The same noise with noise(0) drawn, and the N, H, W of it, which say what images to make.

    None where it is no tensor [N, C, H, W] of numbers for the network, which `checked_noise` refuses.
    ValueError where the network does not take this height and width.
    """
    first = noise(0)
    found = isinstance(first, torch.Tensor) and not first.is_nested and first.ndim == 4
    if not found or not len(first) or first.shape[1] != config.in_channels:
        return noise, None
    count, _, height, width = first.shape
    try:
        config.check_size((height, width))
    except ValueError as error:
        raise ValueError(f"noise(0) is {list(first.shape)}: {error}") from None
    return (lambda k: first if k == 0 else noise(k)), (count, height, width)
