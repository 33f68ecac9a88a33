"""The noise of given images: `invert` of `DDPM`."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from ..importers.diffusers_words import refuse_keywords
from ..inference.arguments import check_batch_size, guidance_of
from ..inference.buffers import Batch
from ..models.structure import config_of
from ..process.noise_levels import NoiseLevels
from ..process.value_range import change_range
from ..samplers import options_of
from ..samplers.inversion import inverse
from ..storage.given_images import given_images
from ..utils.device import check_backend
from ..utils.validation import known_names
from .execution import Execution

# Options of ddim that an inversion decides itself.
NOT_INVERTED = {"eta", "clip", "strength", "guidance_scale", "prediction_type", "noise_in_last_step"}


class Inversion(Execution):
    """A model that finds the noise of images."""

    @torch.no_grad()
    def invert(
        self,
        images: Any,
        labels: int | Sequence[int] | torch.Tensor | None = None,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        iterations: int = 5,
        batch_size: int | None = None,
        backend: str = "auto",
        precision: str = "exact",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        guidance_rescale: float | None = None,
        guidance_parallel: float | None = None,
        **sampler_options: Any,
    ) -> torch.Tensor:
        """The noise from which DDIM makes these images, float32 [N, C, H, W] on the model's device.

            how = {"steps": 50, "guidance_scale": 1}
            noise = model.invert(images, labels, **how)
            again = model.sample(labels, noise=noise, sampler="ddim", clip=None, eta=0, **how)

        DDIM inversion (Song et al. 2021, arXiv 2010.02502, section 4.3), with the iterations of
        `samplers.inversion.inverse`. Another label in `sample` gives an image of this label that has what the
        noise holds of the images, such as their pose.

        images: as `image` of `sample`, N of them.
        labels, steps, guidance_scale, guidance_rescale, guidance_parallel: as those of `sample`, which must
            get the same to reproduce the images. Under guidance, a few images need more iterations.
        iterations: evaluations of the network in each step; 1 is the usual inversion, whose samples are
            similar to the images, and more come closer to them.
        sampler_options: of ddim, such as `spacing`. The others are those of `sample`.

        ValueError as from `sample`, and for a model that predicts the sample or has noise levels. Ctrl-C
        raises `inference.batches.Interrupted`, which holds the finished noise.
        """
        config = config_of(self.unet)
        if isinstance(self.schedule, NoiseLevels) or config.self_condition:
            kind = "a network that gets its last x_0" if config.self_condition else "continuous noise levels"
            raise ValueError(f"a model of {kind} cannot be inverted: ddim does not serve it")
        batch_size = check_batch_size(batch_size, labels, images)
        check_backend(backend)
        options = set(options_of("ddim")) - NOT_INVERTED
        refuse_keywords("invert", sampler_options, options | set(inspect.signature(self.invert).parameters))
        known_names("option of invert", sampler_options, sorted(options))
        x0 = change_range(
            given_images("images", images, config, self.value_range), self.value_range, self.diffused_range
        )
        labels, ids, vectors = self._images(labels, len(x0), None)
        guidance = guidance_of(guidance_scale, self.guidance_scale, labels, self.null_label)
        own = {"clip": None, "eta": 0.0, "guidance_scale": guidance}
        table = inverse(self.steps("ddim", steps, **own, **sampler_options), iterations)
        request = Batch(labels, ids, 0, initial=x0)
        where = (device, dtype, precision, backend)
        return self._run(
            table,
            request,
            vectors,
            where,
            batch_size,
            image_shape=(x0.shape[2], x0.shape[3]),
            guidance_rescale=guidance_rescale,
            guidance_parallel=guidance_parallel,
            progress=progress,
        )
