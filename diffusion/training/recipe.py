"""Recipes: the numbers that define a training. The package's own recipes are the files in recipes/."""

import json
import os
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from ..models.config import UNetConfig
from ..process.objective import check_loss_weighting
from ..process.prediction import check_x0_determined
from ..process.schedule import NoiseSchedule
from ..storage.reading import read_json
from ..utils.validation import choice, known_names, refuse, shown, typed

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
OPTIMIZERS = ("adam", "adamw", "muon")
DECAYS = ("linear", "constant")
TIMESTEP_SAMPLING = ("uniform", "lognormal")

# Bounds of the numbers in a field; a field without bounds takes any finite number.
_BOUNDS: dict[str, dict[str, float]] = {
    "min_snr_gamma": {"above": 0},
    "noise_std": {"above": 0},
    "vlb_weight": {"least": 0},
    "steps": {"least": 1, "most": 10**9},
    "batch_size": {"least": 1, "most": 2**20},
    "weight_decay": {"least": 0},
    "learning_rate": {"above": 0},
    "warmup_steps": {"least": 0, "most": 10**9},
    "decay_fraction": {"above": 0, "most": 1},
    "ema_decay": {"least": 0, "below": 1},
    "more_ema_decays": {"least": 0, "below": 1},
    "gradient_clip": {"above": 0},
    "label_dropout": {"least": 0, "below": 1},
    "seed": {"least": 0},
}


@dataclass(frozen=True)
class Recipe:
    """The numbers that define a training, except data and machine.

    unet, schedule: configurations of `UNetConfig` and `NoiseSchedule`. A UNet with twice as many output as
    input channels learns its variance, by the hybrid loss with vlb_weight (Nichol & Dhariwal 2021, arXiv
    2102.09672, eq. 16). loss_weighting: see `objective.loss_weight`; min_snr_gamma is its gamma.

    steps: optimizer steps of batch_size images, on however many devices. learning_rate: reached after
    warmup_steps. With learning_rate_decay "linear" it falls linearly to zero, over the last decay_fraction of
    the steps after the warm-up, and is constant before them (Hägele et al. 2024, arXiv 2405.18392); with
    "constant" it never falls. optimizer: "adam", "adamw" (Loshchilov & Hutter 2019, arXiv 1711.05101) or
    "muon" (see `optimizers.Optimizer`). weight_decay: of adamw and muon; 0 for adam. timestep_sampling:
    "uniform", or "lognormal" for noise levels sigma / alpha whose logarithm has noise_mean and noise_std
    (Karras et al. 2022, arXiv 2206.00364).
    gradient_clip: largest norm of the whole gradient. ema_decay: of the averaged weights, which are the
    result; more_ema_decays: of further averages that are kept. label_dropout: share of labels replaced by the
    null label (Ho & Salimans 2022, arXiv 2207.12598). horizontal_flip: mirror each image with probability
    1/2. seed: of all random numbers.

    ValueError: a value of a wrong type or out of range.
    """

    unet: dict = field(default_factory=dict)
    schedule: dict = field(default_factory=lambda: NoiseSchedule.cosine().to_config())
    prediction_type: str = "v_prediction"
    loss_weighting: str = "uniform"
    min_snr_gamma: float = 5.0
    timestep_sampling: str = "uniform"
    noise_mean: float = -1.2
    noise_std: float = 1.2
    vlb_weight: float = 0.001
    steps: int = 1000
    batch_size: int = 128
    optimizer: str = "adam"
    weight_decay: float = 0.0
    learning_rate: float = 1e-3
    learning_rate_decay: str = "linear"
    decay_fraction: float = 1.0
    warmup_steps: int = 200
    ema_decay: float = 0.999
    more_ema_decays: tuple[float, ...] = ()
    gradient_clip: float = 1.0
    label_dropout: float = 0.1
    horizontal_flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, typed(name, getattr(self, name), hint, **_BOUNDS.get(name, {})))
        decays = self.more_ema_decays
        if len({self.ema_decay, *decays}) != 1 + len(decays):
            refuse("more_ema_decays", "different from ema_decay and each other", list(decays))
        choice("optimizer", self.optimizer, OPTIMIZERS)
        choice("learning_rate_decay", self.learning_rate_decay, DECAYS)
        choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLING)
        if self.optimizer == "adam" and self.weight_decay:
            refuse("weight_decay", "0 for adam; adamw and muon take one", self.weight_decay)
        check_loss_weighting(self.loss_weighting)
        config = UNetConfig.from_dict(self.unet)
        channels = config.in_channels
        if config.out_channels not in (channels, 2 * channels):
            expected = f"{channels}, or {2 * channels} for a learned variance"
            refuse("out_channels", expected, config.out_channels)
        if config.num_classes is not None and not config.has_null_label and self.label_dropout:
            refuse("label_dropout", "0 without a null label", self.label_dropout)
        schedule = NoiseSchedule.from_config(self.schedule)
        check_x0_determined(self.prediction_type, schedule.alphas_cumprod)
        if config.time_embedding == "fourier":
            raise ValueError("time_embedding 'fourier' cannot be trained: timestep 0 has no logarithm")
        if config.learned_timesteps is not None and config.learned_timesteps < schedule.T:
            refuse("learned_timesteps", f"at least the schedule's {schedule.T}", config.learned_timesteps)
        if config.label_embedding == "identity":
            raise ValueError("label_embedding 'identity' cannot be trained: data sets have whole labels")
        # Plain numbers, as JSON can hold them.
        for name, values in (("unet", config.to_dict()), ("schedule", schedule.to_config())):
            given = getattr(self, name)
            object.__setattr__(self, name, {key: values.get(key, given[key]) for key in given})

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0..steps-1."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.learning_rate_decay == "constant":
            return self.learning_rate * warm
        decay_steps = self.decay_fraction * (self.steps - self.warmup_steps)
        left = (self.steps - step) / max(1, decay_steps)
        return self.learning_rate * min(warm, left)

    def to_json(self) -> str:
        """The recipe as JSON, which `load_recipe` reads."""
        return json.dumps(asdict(self), indent=2)


def load_recipe(name: str | os.PathLike) -> Recipe:
    """A recipe of the package by name ("mnist", "cifar10", ...), or from a JSON file of its fields.

    A file is told from a name by its ending, .json.

    ValueError if there is no such recipe, or the file holds none.
    """
    path = FOLDER / f"{name}.json" if str(name) in RECIPES else Path(name)
    if path.suffix != ".json":
        choice("recipe", str(name), RECIPES, ", or a .json file")
    values = read_json(path)
    try:
        return recipe_from(values)
    except ValueError as error:
        raise ValueError(f"the recipe {path}: {error}") from error


def recipe_from(values: dict) -> Recipe:
    """A recipe from its fields; those left out have their defaults. ValueError for an unknown field."""
    typed("a recipe", values, dict)
    known_names("field of a recipe", values, [entry.name for entry in fields(Recipe)])
    return Recipe(**values)


def changed(recipe: Recipe, changes: list[str]) -> Recipe:
    """A recipe with fields replaced: "steps=1000", "unet.channels=64", "prediction_type=epsilon".

    Values are parsed as JSON, else taken as strings. ValueError for an unknown field or an invalid value.
    """
    values = asdict(recipe)
    for change in changes:
        name, equals, text = change.partition("=")
        *outer, last = name.split(".")
        if not equals or not last or len(outer) > 1 or (outer and outer[0] not in ("unet", "schedule")):
            raise ValueError(
                f"{shown(change)} is not a change of a recipe; examples: steps=1000, unet.channels=64"
            )
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        target = typed(outer[0], values[outer[0]], dict) if outer else values
        target[last] = value
    return recipe_from(values)
