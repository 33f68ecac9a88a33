"""The distance of a model's samples to images that were held out, while it is trained."""

import torch

from ..ddpm import DDPM
from ..inference.loop import Callback
from ..storage.images import to_uint8
from ..utils.frechet import frechet_distance, moments
from .features import Features

MAX_SAMPLES = 500
STEPS = 20


class HeldOutDistance:
    """The Fréchet distance (Heusel et al. 2017, arXiv 1706.08500, eq. 6) of samples to held-out images.

    images: uint8 [N, C, H, W], at least two. labels: int64 [N], or None for an unconditional model. features:
    in which both are compared. As many samples as images, at most MAX_SAMPLES, are drawn with the labels of
    the images, without guidance, by DPM-Solver++ with STEPS steps, from the same noise each time. With so few
    samples the distance is larger than with many: compare it with others of the same run. ValueError for
    images that the features do not take.
    """

    def __init__(self, images: torch.Tensor, labels: torch.Tensor | None, features: Features):
        if len(images) < 2:
            raise ValueError(f"a distance needs at least 2 held-out images, not {len(images)}")
        self.images, self.labels, self.features = images, labels, features
        features.check(features.in_channels(images[:1]))
        self.reference: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, model: DDPM, callback: Callback | None = None) -> float:
        """The distance of a model's samples. callback: that of `DDPM.sample`."""
        count = min(MAX_SAMPLES, len(self.images))
        chosen = torch.arange(count, device="cpu") * len(self.images) // count
        labels = None if self.labels is None else self.labels[chosen]
        steps = min(STEPS, model.schedule.max_steps)
        x = model.sample(
            labels,
            num_samples=count,
            guidance_scale=1.0,
            sampler="dpm++",
            steps=steps,
            callback=callback,
        )
        samples = to_uint8(x.cpu(), model.value_range)
        if self.reference is None:
            self.reference = moments(self._features(self.images))
        return frechet_distance(*moments(self._features(samples)), *self.reference)

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.features.of(self.features.in_channels(images))[0]
