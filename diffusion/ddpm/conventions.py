"""The network of a model, its noise schedule, and the conventions that it was trained with."""

import copy
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..importers.diffusers_words import refuse_scheduler
from ..inference.arguments import threshold_of
from ..inference.denoiser_cache import DenoiserCache
from ..models.class_names import check_names
from ..models.network import Network
from ..models.structure import config_of
from ..process.bound import VARIANCES
from ..process.noise_levels import NoiseLevels
from ..process.prediction import check_prediction_type
from ..process.schedule import NoiseSchedule
from ..process.value_range import SIGNED, check_range
from ..samplers import SAMPLERS, StepTable, check_options, options_of
from ..samplers.model_defaults import check_values, refuse_strength
from ..utils.validation import choice, number, refuse, switch, typed

THRESHOLD = ("dynamic_threshold", "dynamic_threshold_max")


class Conventions(nn.Module):
    """The attributes of a `DDPM`, whose docstring describes them, and its samplers with their defaults."""

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
