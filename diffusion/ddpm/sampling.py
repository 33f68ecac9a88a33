"""Sampling from a model: `sample` of `DDPM`."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from PIL.Image import Image

from ..importers.diffusers_words import refuse_keywords, refuse_unknown
from ..inference import loop
from ..inference.arguments import (
    check_batch_size,
    check_functions,
    guidance_of,
    threshold_of,
    where_to_sample,
)
from ..inference.batches import Interrupted
from ..inference.buffers import Noise
from ..inference.start import Start
from ..models.structure import config_of
from ..process.value_range import change_range
from ..samplers import SHARED_OPTIONS, own_options
from ..storage.given_images import given_images, given_mask
from ..storage.image_types import as_output, check_output
from ..storage.images import to_uint8
from ..utils.device import check_backend
from ..utils.validation import switch, whole_number
from .execution import Execution


class Sampling(Execution):
    """A model that samples images."""

    @overload
    def sample(
        self,
        labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        *,
        num_samples: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        seed: int = 0,
        sample_ids: Sequence[int] | torch.Tensor | None = None,
        batch_size: int | None = None,
        noise: Noise | torch.Tensor | None = None,
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        resamples: int | None = None,
        jump_length: int | None = None,
        backend: str = "auto",
        precision: str = "exact",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        callback: loop.Callback | None = None,
        guidance_rescale: float | None = None,
        guidance_parallel: float | None = None,
        dynamic_threshold: float | None = None,
        dynamic_threshold_max: float = math.inf,
        output: Literal["tensor"] = "tensor",
        return_x0: Literal[False] = False,
        **sampler_options: Any,
    ) -> torch.Tensor: ...

    @overload
    def sample(
        self, labels: Any = None, *, return_x0: Literal[True], **arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    @overload
    def sample(self, labels: Any = None, *, output: Literal["numpy"], **arguments: Any) -> np.ndarray: ...

    @overload
    def sample(self, labels: Any = None, *, output: Literal["pil"], **arguments: Any) -> list[Image]: ...

    @torch.no_grad()
    def sample(
        self,
        labels: int | str | Sequence[int | str] | torch.Tensor | None = None,
        *,
        num_samples: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        seed: int = 0,
        sample_ids: Sequence[int] | torch.Tensor | None = None,
        batch_size: int | None = None,
        noise: Noise | torch.Tensor | None = None,
        image: Any = None,
        strength: float | None = None,
        mask: Any = None,
        resamples: int | None = None,
        jump_length: int | None = None,
        backend: str = "auto",
        precision: str = "exact",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
        callback: loop.Callback | None = None,
        guidance_rescale: float | None = None,
        guidance_parallel: float | None = None,
        dynamic_threshold: float | None = None,
        dynamic_threshold_max: float = math.inf,
        output: str = "tensor",
        return_x0: bool = False,
        **sampler_options: Any,
    ) -> Any:
        """Samples images, float32 [N, C, H, W] on the model's device, in its value_range unless clip is None.

        labels: a class for each image, its number or its name among `class_names`; None for none. A single
            label is repeated. A network whose labels are vectors takes float [N, E].
        num_samples: N; by default the number of labels or that of the noise, or 1.
        guidance_scale: of classifier-free guidance, diffusers' convention: 1 is the conditional prediction,
            0 the unconditional; the w of Ho & Salimans 2022 (arXiv 2207.12598) is guidance_scale - 1. None
            is the model's own with labels, and 1 without.
        sampler, steps: a name of `samplers.SAMPLERS`, and 1..T steps. None is the model's own sampler, and
            its number of steps; another sampler takes all T.
        seed, sample_ids: image i is a function of (seed in 0..2^64-1, sample_ids[i], its label) alone, not of
            its batch; sample_ids are 0..N-1 by default.
        batch_size: number of images made at a time, by default as many as the device evaluates best and has
            free memory for. It is halved while memory does not suffice.
        noise: a function k -> [N, C, H, W] instead of the package's noise: k = 0 gives the initial noise, and
            k = i + 1 that of step i. It is called for each batch, so it must depend on k alone. A tensor
            [N, C, H, W] is the initial noise alone. H and W need not be the model's.
        image: images to change, one or N: a tensor or array [N, C, H, W] in the model's value_range, or uint8
            in 0..255, or PIL images, whose middle is scaled to the model's size. They get noise, and the last
            steps take it away (SDEdit, Meng et al. 2022, arXiv 2108.01073).
        strength: share of the steps that are taken, in (0, 1]: how much of the images changes. By default
            0.8; with a mask 1, and sampling then starts from noise alone.
        mask: paints the images anew where it is 1 and keeps them where it is 0, by RePaint (Lugmayr et al.
            2022, arXiv 2201.09865, algorithm 1): bool, 0..1 or uint8, [H, W] or [N, 1, H, W], or PIL images.
        resamples: with a mask, how often each step is taken, U in RePaint, so that both parts fit together;
            by default 10, and 1 for heun, whose steps cannot be repeated.
        jump_length: with a mask, the number of steps that are repeated together, j in RePaint; by default 1.
        backend: of the kernels; "auto" chooses, and "reference" is plain PyTorch throughout.
        precision: "exact" computes in the model's own dtype, the widest if there are several; "tf32" lets a
            CUDA device round the factors of float32 products to TF32, and is "exact" elsewhere; "fast"
            computes the UNet in bfloat16 where the device multiplies in it. docs/speed.md compares images.
        dtype: of the UNet, "float32", "bfloat16", "float16" or "float64", instead of the precision's; x_t
            is always float32.
        device: where to compute, by default where the model is.
        progress: show a bar with images/s.
        callback: called as callback(i, x, x0) after step i of a batch, with values of the model's
            diffused_range. A tensor that it returns takes the place of x. Changes that it makes to the
            network take effect with the next call at the earliest.
        guidance_rescale: phi of Lin et al. 2023 (arXiv 2305.08891, eq. 16), 0 for none; by default the
            model's own.
        guidance_parallel: share, 0 to 1, that is kept of the part of the guidance's update that is parallel
            to the conditional prediction (Sadat et al. 2024, arXiv 2410.02416); 1 is classifier-free
            guidance. By default the model's own.
        dynamic_threshold: quantile in [0, 1], such as 0.995, to which predicted images are clipped instead of
            `clip` (Saharia et al. 2022, arXiv 2205.11487). None is the model's own sampler's, unless another
            sampler or a `clip` is given.
        dynamic_threshold_max: upper bound of that threshold, at least 1.
        output: "tensor"; "numpy", an array uint8 [N, H, W, C] in 0..255; or "pil", a list of N images of PIL.
        return_x0: return (images, x0s), where x0s are the predicted images of each row of the step table,
            float32 [rows, N, C, H, W]: a row for each step, but 2 * steps - 1 for heun. output must be
            "tensor".
        sampler_options: the keyword arguments of the sampler in `diffusion.steps`, such as `spacing`, `clip`,
            `guidance_interval`, and `eta` for ddim.

        Numbers may be Python's or NumPy's, or tensors without dimensions. ValueError for an argument that is
        out of range or does not fit the model. Ctrl-C raises `inference.batches.Interrupted`, a
        KeyboardInterrupt that holds the finished images.
        """
        seed = whole_number("seed", seed, 0, 2**64 - 1)
        check_output(output, config_of(self.unet).in_channels)
        refuse_keywords("sample", sampler_options)
        refuse_unknown("sample", sampler_options, [*_ARGUMENTS, *SHARED_OPTIONS, *own_options()])
        batch_size = check_batch_size(batch_size, labels, num_samples, sample_ids, noise, image)
        check_functions(noise, callback)
        check_backend(backend)
        start = self._start(noise, image, mask, strength, resamples, jump_length)
        if num_samples is None and sample_ids is None:
            num_samples = start.count
        labels, ids, vectors = self._images(labels, num_samples, sample_ids)
        guidance = guidance_of(guidance_scale, self.guidance_scale, labels, self.null_label)
        if dynamic_threshold is None and "clip" not in sampler_options:
            dynamic_threshold, dynamic_threshold_max = self._own_threshold(sampler, dynamic_threshold_max)
        threshold = threshold_of(dynamic_threshold, dynamic_threshold_max)
        if threshold is not None:
            sampler_options.setdefault("clip", None)
        if image is not None:
            sampler_options["strength"] = start.strength
        table = self.steps(sampler, steps, guidance_scale=guidance, **sampler_options)
        x0s = None
        if switch("return_x0", return_x0):
            if output != "tensor":
                raise ValueError("return_x0 needs output='tensor'")
            self.check_count(len(table) * len(ids), "num_samples of all steps")
            shape = (config_of(self.unet).in_channels, *(start.shape or config_of(self.unet).image_shape))
            x0s = torch.zeros(
                len(table),
                len(ids),
                *shape,
                dtype=torch.float32,
                device=where_to_sample(self.unet, device, dtype, precision)[0],
            )
        try:
            images = self._run(
                table,
                start.request(labels, ids, seed),
                vectors,
                (device, dtype, precision, backend),
                batch_size,
                image_shape=start.shape,
                guidance_rescale=guidance_rescale,
                guidance_parallel=guidance_parallel,
                threshold=threshold,
                callback=callback,
                progress=progress,
                rows=start.rows(table),
                x0s=x0s,
            )
        except Interrupted as error:
            raise Interrupted(self._returned(error.images)) from None
        images = self._returned(images)
        if x0s is not None:
            return images, self._returned(x0s)
        return images if output == "tensor" else as_output(to_uint8(images, self.value_range), output)

    def _start(self, noise: Any, image: Any, mask: Any, *how: Any) -> Start:
        """The `Start` for these arguments of `sample`."""
        config = config_of(self.unet)
        if image is not None:
            image = given_images("image", image, config, self.value_range)
            image = change_range(image, self.value_range, self.diffused_range)
        return Start(config, noise, image, None if mask is None else given_mask(mask, config), *how)

    def _returned(self, images: torch.Tensor) -> torch.Tensor:
        """Images of the sampling loop, in the range in which `sample` returns them."""
        if self.clip_output:
            images = images.clamp(*self.diffused_range)
        return change_range(images, self.diffused_range, self.value_range)


# The arguments of `sample` itself, in its order.
_ARGUMENTS = tuple(inspect.signature(Sampling.sample).parameters)[1:-1]
