"""DDPM: the model that users hold."""

import copy
import os
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

from ..importers.diffusers_words import refuse_call
from ..models.description import described
from ..models.edm import edm_loss
from ..models.structure import config_of
from ..process.bound import variational_bound_terms
from ..process.forward import q_sample
from ..process.images import check_images
from ..process.noise_levels import NoiseLevels, random_levels
from ..process.objective import drop_labels, loss_weight, random_timesteps, self_conditioned, target
from ..process.value_range import change_range
from ..storage import checkpoint, hub
from ..utils.validation import number
from .inversion import Inversion
from .sampling import Sampling


class DDPM(Sampling, Inversion):
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
