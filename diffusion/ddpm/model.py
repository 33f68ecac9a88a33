"""DDPM: a network, its noise schedule and the conventions it was trained with."""

import copy
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NoReturn, overload

import numpy as np
import torch
from PIL.Image import Image
from torch import nn

from .. import importers
from ..importers.diffusers_words import refuse_call, refuse_keywords, refuse_loading, refuse_scheduler
from ..inference import loop
from ..inference.arguments import check_batch_size, check_draws, check_functions, check_one_hot, threshold_of
from ..inference.batches import Interrupted, sample_in_batches
from ..inference.buffers import Batch, Noise
from ..inference.denoiser import Denoiser, DenoiserCache, explain, mixed_dtypes, own_dtype, with_vectors
from ..inference.start import Start
from ..models.class_names import check_names, numbered
from ..models.description import described
from ..models.edm import edm_loss
from ..models.network import Network
from ..models.structure import config_of
from ..process.bound import VARIANCES, variational_bound_terms
from ..process.forward import q_sample
from ..process.images import check_images
from ..process.noise_levels import NoiseLevels, random_levels
from ..process.objective import drop_labels, loss_weight, random_timesteps, self_conditioned, target
from ..process.prediction import check_prediction_type
from ..process.schedule import NoiseSchedule
from ..process.value_range import SIGNED, change_range, check_range
from ..samplers import SAMPLERS, StepTable, check_options, options_of
from ..samplers.inversion import inverse
from ..samplers.model_defaults import check_values, refuse_strength
from ..storage import checkpoint, hub
from ..storage.given_images import given_images, given_mask
from ..storage.image_types import as_output, check_output
from ..storage.images import to_uint8
from ..utils.device import check_backend, check_dtype, multiplies_bfloat16, resolve_device, resolve_dtype
from ..utils.memory import check_fits
from ..utils.plain_pytorch import tell_of_plain_pytorch
from ..utils.validation import (
    choice,
    known_names,
    number,
    refuse,
    switch,
    typed,
    whole_number,
    whole_numbers,
)

THRESHOLD = ("dynamic_threshold", "dynamic_threshold_max")
PRECISIONS = ("exact", "tf32", "fast")
# Options of ddim that an inversion decides itself.
NOT_INVERTED = {"eta", "clip", "strength", "guidance_scale", "prediction_type", "noise_in_last_step"}


class DDPM(nn.Module):
    """A denoising diffusion model (Ho et al. 2020, arXiv 2006.11239).

    unet: the network, called with (x_t, t, label): a UNet or another of `models.registry.NETWORKS`.
    schedule: the noise schedule, of T timesteps, or the continuous noise levels of EDM.
    prediction_type: output of the UNet, "epsilon", "sample" (x_0) or "v_prediction".
    clip: predicted images are clipped to [-clip, clip] while sampling; None for no clipping.
    variance: default of the "ddpm" sampler; "learned_range" for a UNet with learned variance.
    sampler_options: this model's defaults for the options of samplers, by the sampler's name, such as
        {"ddim": {"use_clipped_model_output": True}}, which DDIM needs under guidance.
    sampler: the model's own sampler, such as {"name": "dpm++", "steps": 10, "spacing": "trailing"}: a name of
        `samplers.SAMPLERS`, the number of steps (all T without it) and options, with `dynamic_threshold` and
        `dynamic_threshold_max` of `sample`. Without any, "ddpm".
    guidance_scale, guidance_rescale, guidance_parallel: of images with labels, unless `sample` gets others.
    value_range: of the images that `sample` returns and `loss` takes.
    normalize: images are diffused in [-1, 1], to which value_range is mapped; False diffuses them in
        value_range itself.
    clip_output: the sampled images are clipped to value_range at the end.
    class_names: the names of the labels 0, 1, ..., which `sample` takes as labels; None for none.
    metadata: JSON values that `save` writes to config.json as well.
    """

    def __init__(
        self,
        unet: Network,
        schedule: NoiseSchedule | NoiseLevels,
        *,
        prediction_type: str = "epsilon",
        clip: float | None = 1.0,
        variance: str | None = None,
        sampler_options: dict[str, dict[str, Any]] | None = None,
        sampler: dict[str, Any] | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        guidance_parallel: float = 1.0,
        value_range: tuple[float, float] = SIGNED,
        normalize: bool = True,
        clip_output: bool = False,
        class_names: Sequence[str] | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__()
        check_prediction_type(prediction_type)
        config = config_of(unet)
        channels, outputs = config.in_channels, config.out_channels
        if outputs not in (channels, 2 * channels):
            expected = f"{channels}, or {2 * channels} for a learned variance"
            refuse("out_channels of the network", expected, outputs)
        self.unet = unet
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.clip = None if clip is None else number("clip", clip, above=0)
        if variance is None:
            variance = "learned_range" if config.learned_variance else "fixed_small"
        self.variance = choice("variance", variance, VARIANCES)
        self.sampler_options = copy.deepcopy({} if sampler_options is None else sampler_options)
        for name, options in typed("sampler_options", self.sampler_options, dict).items():
            check_options(name, typed(f"sampler_options[{name!r}]", options, dict))
            refuse_strength(options)
            check_values(name, options, self.schedule)
        self.sampler = copy.deepcopy(typed("sampler", sampler, dict | None))
        if self.sampler is not None:
            choice("sampler's name", self.sampler.get("name"), SAMPLERS)
            refuse_strength(self.sampler)
            threshold_of(*self._own_threshold(None))
            self.steps()  # raises where the steps or an option do not fit the model
        self.guidance_scale = number("guidance_scale", guidance_scale)
        self.guidance_rescale = number("guidance_rescale", guidance_rescale, 0, 1)
        self.guidance_parallel = number("guidance_parallel", guidance_parallel, 0, 1)
        self.value_range = check_range("value_range", value_range)
        self.normalize = switch("normalize", normalize)
        self.clip_output = switch("clip_output", clip_output)
        self.class_names = None if class_names is None else check_names(class_names, self.num_classes)
        self.metadata = dict(typed("metadata", {} if metadata is None else metadata, dict))
        self._denoisers = DenoiserCache()

    @property
    def num_classes(self) -> int | None:
        """Number of class labels, or None for an unconditional model."""
        return config_of(self.unet).num_classes

    @property
    def null_label(self) -> int | None:
        """The label that stands for no label, which guidance needs; None for a model that has none."""
        return config_of(self.unet).null_label

    @property
    def diffused_range(self) -> tuple[float, float]:
        """The range of the values of x_0 in the diffusion process, in which callbacks see images."""
        return SIGNED if self.normalize else self.value_range

    def __repr__(self) -> str:
        """One line: image size, classes, prediction, schedule, parameters and device."""
        return described("DDPM", self.unet, self.prediction_type, self.schedule)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses, because a model samples by `sample`, trains by `loss` and predicts by `unet`."""
        refuse_call()

    def copy(self) -> "DDPM":
        """A copy with its own weights."""
        return copy.deepcopy(self)

    def loss(
        self,
        x0: torch.Tensor,
        labels: torch.Tensor | None = None,
        *,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        label_dropout: float = 0.0,
        weighting: str = "uniform",
        min_snr_gamma: float = 5.0,
        vlb_weight: float = 0.001,
        network: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Mean weighted squared error of the prediction at timesteps t; a scalar.

        x0: images, float [B, C, H, W] in the model's value_range.
        labels: int64 [B] in 0..num_classes-1, or None.
        t: int64 [B]; by default drawn by `random_timesteps`, from PyTorch's global generators. A model with
            noise levels takes those, float [B]; by default drawn by `noise_levels.random_levels`.
        noise: like x0; by default drawn, likewise.
        label_dropout: share of the labels that the null label replaces, 0 to 1.
        weighting, min_snr_gamma: see `objective.loss_weight`. For noise levels, see `models.edm.edm_loss`.
        vlb_weight: weight of the variational bound, in bits per dimension, for a UNet with learned variance.
            The bound is T times the mean of its terms, and only the variance gets its gradient (Nichol &
            Dhariwal 2021, arXiv 2102.09672, section 3.1).
        network: called instead of the UNet, such as a wrapper of it.

        ValueError for images of another type, or, on the CPU, of values far outside [-1, 1].
        """
        check_images(x0)
        x0 = change_range(x0, self.value_range, self.diffused_range)
        if labels is not None and not isinstance(labels, torch.Tensor):
            raise ValueError(f"labels must be an int64 tensor [{len(x0)}], not {type(labels).__name__}")
        label_dropout, vlb_weight = (
            number("label_dropout", label_dropout, 0, 1),
            number("vlb_weight", vlb_weight, 0),
        )
        if t is None and isinstance(self.schedule, NoiseLevels):
            t = random_levels(len(x0), x0.device)
        t = random_timesteps(len(x0), self.schedule.T, x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        if labels is not None and label_dropout:
            labels = drop_labels(labels, label_dropout, self.null_label)
        predict = self.unet if network is None else network
        if isinstance(self.schedule, NoiseLevels):
            return edm_loss(config_of(self.unet), predict, x0, labels, t, noise, weighting)
        x_t = q_sample(self.schedule, x0, t, noise)
        if config_of(self.unet).self_condition:
            predict = self_conditioned(predict, self.schedule, self.prediction_type)
        output = predict(x_t, t, labels).float()
        prediction = output[:, : x0.shape[1]]
        errors = prediction - target(self.schedule, self.prediction_type, x0, t, noise)
        weights = loss_weight(self.schedule, self.prediction_type, t, weighting, min_snr_gamma)
        loss = (weights * errors.square().flatten(1).mean(1)).mean()
        if config_of(self.unet).learned_variance:
            frozen = torch.cat([prediction.detach(), output[:, x0.shape[1] :]], dim=1)
            terms = variational_bound_terms(
                self.schedule, self.prediction_type, self.variance, x0, x_t, t, frozen, clip=None
            )
            loss = loss + vlb_weight * self.schedule.T * terms.mean()
        return loss

    def steps(self, sampler: str | None = None, steps: int | None = None, **options: Any) -> StepTable:
        """The table of a sampler for this model.

        sampler: a name of `samplers.SAMPLERS`, or None for the model's own.
        steps: 1..T. None is the number of the model's own sampler, or all T for another one.
        options: see `diffusion.steps`. Those left out are the model's defaults for this sampler.

        ValueError for an unknown sampler or option.
        """
        name, steps, options = self.chosen_sampler(sampler, steps, options)
        defaults = {"prediction_type": self.prediction_type, "clip": self.clip}
        if "variance" in options_of(name):
            defaults["variance"] = self.variance
        table = SAMPLERS[name](self.schedule, steps, **(defaults | options))
        if table.learned_variance and not config_of(self.unet).learned_variance:
            raise ValueError(
                "variance 'learned_range' needs a UNet that puts out a variance; this one does not"
            )
        return table

    def chosen_sampler(
        self, sampler: str | None = None, steps: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, int | None, dict[str, Any]]:
        """The name, steps and options of a sampler, after the model's own have filled what is left out.

        sampler, steps, options: as those of `steps`. The returned steps are None for all T. ValueError for an
        unknown sampler or option.
        """
        own = {k: v for k, v in (self.sampler or {"name": "ddpm"}).items() if k not in THRESHOLD}
        own_name, own_steps = own.pop("name"), own.pop("steps", None)
        name = own_name if sampler is None else sampler
        refuse_scheduler(name)
        options = {} if options is None else options
        check_options(name, options)
        defaults = self.sampler_options.get(name, {})
        if name == own_name:
            steps = own_steps if steps is None else steps
            check_options(name, own)
            defaults = defaults | own
        return name, steps, defaults | options

    def _own_threshold(self, sampler: str | None, max_value: float = math.inf) -> tuple[float | None, float]:
        """The dynamic threshold of the model's own sampler, and its bound, if a call of `sample` uses it."""
        own = self.sampler or {}
        if "dynamic_threshold" not in own or sampler not in (None, own["name"]):
            return None, max_value
        bound = own.get("dynamic_threshold_max", math.inf) if max_value == math.inf else max_value
        return own["dynamic_threshold"], bound

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
            k = i + 1 that of step i. It is called for each batch, so it must depend on k alone. Or a tensor
            [N, C, H, W], the initial noise alone. H and W need not be the model's.
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
        batch_size = check_batch_size(batch_size, labels, num_samples, sample_ids, noise, image)
        check_functions(noise, callback)
        check_backend(backend)
        start = self._start(noise, image, mask, strength, resamples, jump_length)
        if num_samples is None and sample_ids is None:
            num_samples = start.count
        vectors = None
        if config_of(self.unet).label_size is not None:
            vectors, labels = self._vectors(labels)
        labels, ids = self._images(labels, num_samples, sample_ids)
        guidance = self._guidance(guidance_scale, labels)
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
                device=self._where(device, dtype, precision)[0],
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
            # What noise and callbacks give is checked on the CPU alone.
            source = "the UNet" if denoiser.device.type == "cpu" else "the UNet, a noise or a callback"
            raise ValueError(f"{source} gave NaN or infinite values in {str(denoiser.dtype)[6:]}")
        return images

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
            get the same to reproduce the images. Guided, a few images need more
            iterations.
        iterations: evaluations of the network in each step; 1 is the usual inversion, whose samples are
            similar to the images, and more come closer to them.
        sampler_options: of ddim, such as `spacing`. The others are those of `sample`.

        ValueError as from `sample`, and for a model that predicts the sample or has noise levels. Ctrl-C
        raises `inference.batches.Interrupted`, which holds the finished noise.
        """
        config, vectors = config_of(self.unet), None
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
        if config.label_size is not None:
            vectors, labels = self._vectors(labels)
        labels, ids = self._images(labels, len(x0), None)
        guidance = self._guidance(guidance_scale, labels)
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

    def check_count(self, count: int, name: str = "num_samples") -> int:
        """`count` as an int; ValueError unless the device has memory for so many images."""
        count, config = whole_number(name, count, 1), config_of(self.unet)
        size = 4 * count * config.in_channels * math.prod(config.image_shape)
        check_fits(f"{count:,} images", size, next(self.unet.parameters()).device)
        return count

    def save(self, folder: str | os.PathLike, *, dtype: torch.dtype | None = None, **metadata: Any) -> None:
        """Writes `config.json` and `model.safetensors` into a folder, complete or not at all.

        dtype: of the stored weights, float32, bfloat16, float16 or float64; by default the model's own.
        metadata: JSON values for config.json, or numbers of NumPy and torch.

        Hooks and other code are not stored. ValueError if the folder cannot be written, if the weights are
        not those of the UNet's configuration or not finite in this dtype, or if the metadata is not JSON.
        """
        config = {"schedule": self.schedule.to_config(), **self.conventions()}
        config["metadata"] = self.metadata | metadata
        checkpoint.write(folder, self.unet, config, dtype)

    def card(
        self,
        name: str = "my-model",
        *,
        results: hub.Result | Iterable[hub.Result] = (),
        license: str | None = None,
    ) -> str:
        """A model card: the text of a README.md with the hub's metadata, the model's facts and results.

        name: of the repository, such as "owner/name". results: a file that `diffusion evaluate --out` wrote,
        or its contents, or several; each appears with its protocol. Paths appear without their folders.
        license: an identifier of the hub, such as "mit".
        ValueError for a file that is no such result, or without huggingface_hub (the extra `hub`).
        """
        return hub.model_card(self, name, results=results, license=license)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        results: hub.Result | Iterable[hub.Result] = (),
        license: str | None = None,
        card: str | None = None,
        commit_message: str = "Upload model",
        dtype: torch.dtype | None = None,
    ) -> str:
        """Uploads the model folder to the hub, where `load("hf:owner/name")` finds it; returns its address.

        name: of the repository, "owner/name", which is made if it does not exist. private: whether it then
        is. token: of the hub; by default that of `hf auth login`. results, license: as for `card`, whose text
        becomes README.md; card: another text for that file. dtype: as for `save`.

        ValueError, in one line, for whatever the hub refuses, or without huggingface_hub (the extra `hub`).
        """
        text = self.card(name, results=results, license=license) if card is None else card
        return hub.push(self, name, text, private=private, token=token, message=commit_message, dtype=dtype)

    def conventions(self) -> dict[str, Any]:
        """The arguments of `DDPM` that this model was made with, beyond the network and the schedule."""
        return {
            "prediction_type": self.prediction_type,
            "clip": self.clip,
            "variance": self.variance,
            "sampler_options": self.sampler_options,
            "sampler": self.sampler,
            "guidance_scale": self.guidance_scale,
            "guidance_rescale": self.guidance_rescale,
            "guidance_parallel": self.guidance_parallel,
            "value_range": self.value_range,
            "normalize": self.normalize,
            "clip_output": self.clip_output,
            "class_names": self.class_names,
            "metadata": self.metadata,
        }

    def _images(
        self, labels: Any, num_samples: int | None, sample_ids: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Labels int64 [N] or None, and sample ids int64 [N], both on the CPU."""
        if labels is not None and config_of(self.unet).label_size is None:
            if self.num_classes is None:
                raise ValueError("labels are given, but this model is unconditional")
            check_one_hot(labels, self.num_classes)
            labels = numbered(labels, self.class_names, self.num_classes)
            labels = whole_numbers("labels", labels, 0, self.num_classes - 1)
        if labels is None and self.null_label is None and self.num_classes is not None:
            raise ValueError("this model was trained without a null label, so it needs labels")
        count = len(labels) if labels is not None else 1
        if sample_ids is not None:
            sample_ids = whole_numbers("sample_ids", sample_ids, 0)
            count = len(sample_ids) if count == 1 else count
        if num_samples is not None:
            count = self.check_count(num_samples)
        if count == 0:
            raise ValueError(f"{'sample_ids' if labels is None else 'labels'} are empty; give at least one")
        if labels is not None and len(labels) == 1:
            labels = labels.expand(count).clone()
        if labels is not None and len(labels) != count:
            raise ValueError(f"there are {len(labels)} labels for {count} images")
        if sample_ids is None:
            sample_ids = torch.arange(count, device="cpu")
        if len(sample_ids) != count:
            raise ValueError(f"there are {len(sample_ids)} sample_ids for {count} images")
        return labels, sample_ids

    def _vectors(self, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct vectors [K, E] among labels [N, E], and the number of each label's row, int64 [N]."""
        size = config_of(self.unet).label_size
        found = isinstance(labels, torch.Tensor) and labels.ndim == 2 and labels.shape[1] == size
        if not found or not labels.is_floating_point():
            refuse("labels", f"vectors [N, {size}], a tensor of floats", labels)
        return labels.detach().float().cpu().unique(dim=0, return_inverse=True)

    def _guidance(self, guidance_scale: float | None, labels: torch.Tensor | None) -> float:
        """The guidance scale; ValueError unless it is 1, or there are labels and a null label."""
        if guidance_scale is None:
            guidable = labels is not None and self.null_label is not None
            return self.guidance_scale if guidable else 1.0
        guidance = number("guidance_scale", guidance_scale)
        if labels is None and guidance != 1:
            raise ValueError("guidance_scale needs labels to guide towards; without labels it must be 1")
        if labels is not None and self.null_label is None and guidance != 1:
            raise ValueError("this model has no null label, so guidance_scale must be 1")
        return guidance

    def release_memory(self) -> None:
        """Lets go of what `sample` keeps for its next call: copies of the network, buffers, captured steps.

        On a GPU, `torch.cuda.empty_cache()` then gives their memory to other programs.
        """
        self._denoisers = DenoiserCache()

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
        return explain(self.unet, *self._where(device, dtype, precision), check_backend(backend))

    def _denoiser(
        self,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        precision: str,
        backend: str,
    ) -> Denoiser:
        """The network that samples: the UNet planned for the CPU if it can be, else in eval mode."""
        where = self._where(device, dtype, precision)
        return self._denoisers.get(self.unet, *where, backend, tf32=precision == "tf32")

    def _where(
        self, device: str | torch.device | None, dtype: str | torch.dtype | None, precision: str
    ) -> tuple[torch.device, torch.dtype]:
        """The device that samples, and the dtype that the UNet has there."""
        config_of(self.unet)
        device = resolve_device(next(self.unet.parameters()).device if device is None else device)
        choice("precision", precision, PRECISIONS)
        if dtype is None and precision == "fast" and multiplies_bfloat16(device):
            dtype = torch.bfloat16
        dtype = own_dtype(self.unet) if dtype is None else resolve_dtype(dtype)
        check_dtype(device, dtype)
        return device, dtype


def load(
    name: str | os.PathLike | Any,
    device: str | torch.device | None = None,
    *,
    scheduler: Any = None,
    verify: bool = True,
    flags: dict[str, Any] | None = None,
    **unknown: NoReturn,
) -> DDPM:
    """Loads a model: a bundled one such as "mnist", a model folder, "hf:owner/name", a foreign checkpoint, or
    a pipeline or UNet2DModel of diffusers in memory, whose weights are copied.

    device: where to put the model; by default the device of an object, and the CPU for all else.
    scheduler: a scheduler of diffusers, or its configuration, by which the model samples, instead of the
        pipeline's; a UNet2DModel alone needs it.
    verify: compare the weights with the SHA-256 in config.json, if it holds one; False takes any weights.
    flags: settings that a foreign checkpoint does not hold, by name, such as {"class_cond": True}; see
        `diffusion.importers`. A UserWarning names the values that are assumed for all others.

    ValueError if the model is missing or damaged, or the file or folder is not a model. TypeError for an
    object that is none of these, or another keyword; one of diffusers gets what to write here.
    """
    refuse_loading(unknown)
    if isinstance(name, str | os.PathLike):
        if scheduler is not None:
            flags = (flags or {}) | {"schedule": importers.scheduler_config(scheduler)}
        device = resolve_device("cpu" if device is None else device)
        imported = importers.read(name, verify=verify, flags=flags)
    else:
        imported = importers.read_object(name, scheduler, flags)
        device = resolve_device(getattr(name, "device", "cpu") if device is None else device)
        name = type(name).__name__
    if assumed := imported.assumed_text():
        warnings.warn(f"{name} does not say how it was trained; assumed: {assumed}", stacklevel=2)
    if imported.note:
        warnings.warn(f"{name}: {imported.note}", stacklevel=2)
    try:
        model = DDPM(imported.unet, imported.schedule, **imported.conventions)
    except ValueError as error:
        raise ValueError(f"the configuration of {name}: {error}") from error
    return model.to(device).eval()
