"""Samples any number of images, in batches that fit into the memory of the device."""

import math
from collections.abc import Callable

import torch
from tqdm import tqdm

from ..models.network import NetworkConfig
from ..samplers.table import StepTable
from ..utils.memory import check_fits, free_memory, is_out_of_memory
from ..utils.validation import check_dense
from . import loop
from .buffers import Batch, Noise
from .denoiser import Denoiser

# Images that the UNet evaluates together unless the caller chooses. More do not fit into the caches of a CPU;
# see `python -m benchmarks.sampling`.
MAX_BATCH_ON_CPU = 32
MAX_BATCH = 512  # on other devices


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while sampling. images: float32 [M, C, H, W], those of the finished batches, or their noise."""

    def __init__(self, images: torch.Tensor):
        super().__init__("sampling was interrupted")
        self.images = images


def sample_in_batches(
    denoiser: Denoiser,
    table: StepTable,
    request: Batch,
    config: NetworkConfig,
    batch_size: int | None = None,
    *,
    image_shape: tuple[int, int] | None = None,
    guidance_rescale: float = 0.0,
    guidance_parallel: float = 1.0,
    threshold: loop.Threshold | None = None,
    callback: loop.Callback | None = None,
    progress: bool = False,
    rows: list[int] | None = None,
    x0s: torch.Tensor | None = None,
) -> torch.Tensor:
    """`loop.run` for all images of a request, float32 [N, C, H, W] on the denoiser's device.

    request: labels and sample ids [N], on any device, and noise, images and mask of N.
    config: of the network.
    image_shape: height and width of the images, by default the configuration's.
    batch_size: images made at a time; by default all with a request's own noise, else `affordable_batch`. It
        is halved while memory does not suffice.
    progress: show a bar with images/s.
    rows: see `loop.run`.
    x0s: float32 [steps, N, C, H, W], overwritten with the predicted x_0 of each step; None for none.

    ValueError where the memory does not suffice for one image. Ctrl-C raises `Interrupted`.
    """
    count, shape = len(request.sample_ids), (config.in_channels, *(image_shape or config.image_shape))
    size = batch_size or count
    if batch_size is None and request.noise is None:
        guided = request.labels is not None and any(g != 1 for g in table.column("guidance_scale"))
        size = affordable_batch(denoiser, config, guided)
        size = math.ceil(count / math.ceil(count / size))  # batches of equal size, as far as possible
    images = torch.empty(count, *shape, device=denoiser.device, dtype=torch.float32)
    start = 0
    try:
        with _Progress(count, len(table if rows is None else rows), progress) as bar:
            while start < count:
                part = slice(start, min(start + size, count))
                try:
                    images[part] = loop.run(
                        denoiser,
                        table,
                        _part_of(request, part, shape, denoiser.device),
                        shape,
                        guidance_rescale=guidance_rescale,
                        guidance_parallel=guidance_parallel,
                        threshold=threshold,
                        callback=callback if x0s is None else _recording(x0s[:, part], callback),
                        progress=bar.step_of(part.stop - start) if progress else None,
                        rows=rows,
                    )
                    start = part.stop
                except (MemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if size == 1:
                        raise ValueError(
                            f"there is not enough memory on {denoiser.device} for one image"
                        ) from error
                    size = math.ceil(min(size, count - start) / 2)
                    bar.back_to(start)
    except KeyboardInterrupt:
        raise Interrupted(images[:start]) from None
    return images


def _recording(x0s: torch.Tensor, callback: loop.Callback | None) -> loop.Callback:
    """A callback that writes each x_0 into x0s [steps, B, C, H, W], and then calls another one."""

    def record(i: int, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor | None:
        x0s[i] = x0
        return None if callback is None else callback(i, x, x0)

    return record


def affordable_batch(denoiser: Denoiser, config: NetworkConfig, guided: bool) -> int:
    """The largest batch, or fewer if half of the free memory should not hold their feature maps.

    guided: the UNet evaluates each image twice. ValueError where no image fits.
    """
    evaluations = 2 if guided else 1
    most = (MAX_BATCH_ON_CPU if denoiser.device.type == "cpu" else MAX_BATCH) // evaluations
    free = free_memory(denoiser.device)
    if free is None:
        return most
    numbers, largest = config.feature_maps()
    size = evaluations * numbers * denoiser.dtype.itemsize
    # The input and the output of a block exist at the same time, at least.
    largest *= 2 * denoiser.dtype.itemsize
    check_fits("the feature maps of one image", largest, denoiser.device)
    return max(1, min(most, free // (2 * size)))


def _part_of(request: Batch, part: slice, shape: tuple[int, ...], device: torch.device) -> Batch:
    """The images `part` of a request, as a batch."""

    def of(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[part].to(device)

    return Batch(
        labels=None if request.labels is None else request.labels[part].cpu(),
        sample_ids=request.sample_ids[part],
        seed=request.seed,
        noise=None if request.noise is None else _rows(request, part, shape),
        initial=of(request.initial),
        image=of(request.image),
        mask=of(request.mask),
        from_noise=request.from_noise,
    )


def _rows(request: Batch, part: slice, shape: tuple[int, ...]) -> Noise:
    """The rows `part` of the request's noise; ValueError unless it is [N, *shape]."""
    noise, count = request.noise, len(request.sample_ids)
    assert noise is not None

    def rows(k: int) -> torch.Tensor:
        return check_dense(f"noise({k})", noise(k), (count, *shape))[part].float()

    return rows


class _Progress:
    """A bar of finished images. Each step of a batch counts as a share of its images."""

    def __init__(self, images: int, steps: int, shown: bool):
        layout = "{percentage:3.0f}%|{bar}| {n:.0f}/{total} images [{elapsed}<{remaining}, {rate_fmt}]"
        self.bar = tqdm(total=images, unit=" images", bar_format=layout, disable=not shown)
        self.images, self.steps = images, steps

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def step_of(self, images: int) -> Callable[[], None]:
        """A function that moves the bar by one step of a batch of `images`."""

        def step() -> None:
            self.bar.update(min(images / self.steps, self.images - self.bar.n))  # sums may round up

        return step

    def back_to(self, images: int) -> None:
        """Moves the bar to a number of finished images."""
        self.bar.update(images - self.bar.n)
