"""The network of a model at work: where it samples, and the batches that it samples."""

import math
from typing import Any

import torch

from ..inference.arguments import check_draws, labels_and_ids, vectors_of, where_to_sample
from ..inference.batches import sample_in_batches
from ..inference.buffers import Batch
from ..inference.denoiser import Denoiser, explain, mixed_dtypes, with_vectors
from ..inference.denoiser_cache import DenoiserCache
from ..models.structure import config_of
from ..samplers import StepTable
from ..utils.device import check_backend
from ..utils.memory import check_fits
from ..utils.plain_pytorch import tell_of_plain_pytorch
from ..utils.validation import number, whole_number
from ..utils.words import counted
from .conventions import Conventions


class Execution(Conventions):
    """A model whose network can run."""

    def explain(
        self,
        *,
        backend: str = "auto",
        precision: str = "exact",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> str:
        """How `sample` would run the UNet for these arguments, with the reasons against a faster way.

        "unet: fused", or "unet: modules", the UNet's own code, for example on another device than the CPU, or
        for an altered UNet. An altered UNet gives what its modules compute, only slower. Errors as `sample`.
        """
        where = where_to_sample(self.unet, device, dtype, precision)
        return explain(self.unet, *where, check_backend(backend))

    def release_memory(self) -> None:
        """Lets go of what `sample` keeps for its next call: copies of the network, buffers, captured steps.

        On a GPU, `torch.cuda.empty_cache()` then gives their memory to other programs.
        """
        self._denoisers = DenoiserCache()

    def check_count(self, count: int, name: str = "num_samples") -> int:
        """`count` as an int; ValueError unless the device has memory for so many images."""
        count, config = whole_number(name, count, 1), config_of(self.unet)
        size = 4 * count * config.in_channels * math.prod(config.image_shape)
        check_fits(counted(count, "image"), size, next(self.unet.parameters()).device)
        return count

    def _images(
        self, labels: Any, num_samples: int | None, sample_ids: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Labels int64 [N] or None, sample ids int64 [N], and the vectors that labels number, if they do."""
        config, vectors = config_of(self.unet), None
        if config.label_size is not None:
            vectors, labels = vectors_of(labels, config.label_size)
        count = None if num_samples is None else self.check_count(num_samples)
        labels, ids = labels_and_ids(labels, count, sample_ids, config, self.class_names)
        return labels, ids, vectors

    def _run(
        self,
        table: StepTable,
        request: Batch,
        vectors: torch.Tensor | None,
        where: tuple[Any, Any, str, str],
        batch_size: int | None,
        *,
        guidance_rescale: float | None,
        guidance_parallel: float | None,
        **how: Any,
    ) -> torch.Tensor:
        """The images of a request, in the range that is diffused, also where Ctrl-C raises `Interrupted`.

        vectors: those that the labels are the numbers of, if any. where: device, dtype, precision and
        backend. guidance_rescale, guidance_parallel: None is the model's own. how: further arguments of
        `sample_in_batches`. ValueError for images that are not finite.
        """
        rescale = self.guidance_rescale if guidance_rescale is None else guidance_rescale
        parallel = self.guidance_parallel if guidance_parallel is None else guidance_parallel
        how |= {
            "guidance_rescale": number("guidance_rescale", rescale, 0, 1),
            "guidance_parallel": number("guidance_parallel", parallel, 0, 1),
        }
        denoiser = self._denoiser(*where)
        if vectors is not None:
            denoiser = with_vectors(denoiser, vectors)
        check_draws(denoiser)
        if where[3] != "reference":
            tell_of_plain_pytorch(denoiser.device)
        try:
            images = sample_in_batches(denoiser, table, request, config_of(self.unet), batch_size, **how)
        except RuntimeError as error:
            mixed = mixed_dtypes(self.unet) if "type" in str(error) else None
            if mixed is not None:
                raise ValueError(mixed) from error
            raise
        if not images.isfinite().all():
            # The results of noise and callbacks are checked on the CPU alone.
            source = "the UNet" if denoiser.device.type == "cpu" else "the UNet, a noise or a callback"
            raise ValueError(f"{source} gave NaN or infinite values in {str(denoiser.dtype)[6:]}")
        return images

    def _denoiser(
        self,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        precision: str,
        backend: str,
    ) -> Denoiser:
        """The network that samples: the UNet planned for the CPU if it can be, else in eval mode."""
        where = where_to_sample(self.unet, device, dtype, precision)
        return self._denoisers.get(self.unet, *where, backend, tf32=precision == "tf32")
