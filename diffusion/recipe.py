"""Recipes: what is trained and how, in numbers; those of the package are the files in recipes/."""

import json
import math
import os
import types
import typing
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from .process import check_loss_weighting, check_x0_determined
from .reading import read_json
from .schedule import NoiseSchedule
from .unet_config import UNetConfig

FOLDER = Path(__file__).parent / "recipes"
RECIPES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
OPTIMIZERS = ("adam", "adamw")
DECAYS = ("linear", "constant")


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; everything that decides the resulting weights, but for the machine.

    unet, schedule: configurations of `UNetConfig` and `NoiseSchedule`. A UNet with twice as many output as
    input channels learns its variance, by the hybrid loss with vlb_weight (Nichol & Dhariwal 2021, arXiv
    2102.09672, eq. 16). loss_weighting: see `process.loss_weight`; min_snr_gamma is its gamma.

    steps: optimiser steps of batch_size images, on however many devices. learning_rate: reached after
    warmup_steps, then falling linearly to zero or, learning_rate_decay "constant", staying. optimizer:
    "adam" or "adamw" (Loshchilov & Hutter 2019, arXiv 1711.05101), which alone takes a weight_decay.
    gradient_clip: largest norm of the whole gradient. ema_decay: of the averaged weights, which are what is
    kept; more_ema_decays: of averages kept beside them. label_dropout: share of labels replaced by the null
    label (Ho & Salimans 2022, arXiv 2207.12598). horizontal_flip: mirror every other image, at random.

    ValueError: a value of a wrong type or out of range.
    """

    unet: dict = field(default_factory=dict)
    schedule: dict = field(default_factory=lambda: NoiseSchedule.cosine().to_config())
    prediction_type: str = "v_prediction"
    loss_weighting: str = "uniform"
    min_snr_gamma: float = 5.0
    vlb_weight: float = 0.001
    steps: int = 1000
    batch_size: int = 128
    optimizer: str = "adam"
    weight_decay: float = 0.0
    learning_rate: float = 1e-3
    learning_rate_decay: str = "linear"
    warmup_steps: int = 200
    ema_decay: float = 0.999
    more_ema_decays: tuple[float, ...] = ()
    gradient_clip: float = 1.0
    label_dropout: float = 0.1
    horizontal_flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), hint))
        for name in ("steps", "batch_size"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("learning_rate", "gradient_clip", "min_snr_gamma"):
            _require(getattr(self, name) > 0, name, "positive", getattr(self, name))
        for name in ("warmup_steps", "weight_decay", "vlb_weight", "seed"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("ema_decay", "label_dropout"):
            _require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        decays = self.more_ema_decays
        _require(all(0 <= decay < 1 for decay in decays), "more_ema_decays", "in [0, 1)", list(decays))
        different = len({self.ema_decay, *decays}) == 1 + len(decays)
        _require(different, "more_ema_decays", "different from ema_decay and each other", list(decays))
        for name, known in (("optimizer", OPTIMIZERS), ("learning_rate_decay", DECAYS)):
            _require(getattr(self, name) in known, name, " or ".join(known), repr(getattr(self, name)))
        if self.optimizer == "adam":
            _require(self.weight_decay == 0, "weight_decay", "0 for adam; adamw takes one", self.weight_decay)
        check_loss_weighting(self.loss_weighting)
        config = UNetConfig.from_dict(self.unet)
        channels = config.in_channels
        expected = f"{channels}, or {2 * channels} for a learned variance"
        _require(
            config.out_channels in (channels, 2 * channels), "out_channels", expected, config.out_channels
        )
        if config.num_classes is not None and not config.has_null_label:
            _require(self.label_dropout == 0, "label_dropout", "0 without a null label", self.label_dropout)
        check_x0_determined(self.prediction_type, NoiseSchedule.from_config(self.schedule).alphas_cumprod)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0..steps-1."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.learning_rate_decay == "constant":
            return self.learning_rate * warm
        left = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * min(warm, left)

    def to_json(self) -> str:
        """What `load_recipe` reads."""
        return json.dumps(asdict(self), indent=2)


def load_recipe(name: str | os.PathLike) -> Recipe:
    """A recipe of the package by name ("mnist", "cifar10", ...), or from a JSON file of its fields.

    ValueError if there is none, or it is no recipe.
    """
    path = FOLDER / f"{name}.json" if str(name) in RECIPES else Path(name)
    if path.suffix != ".json":
        raise ValueError(f"unknown recipe {str(name)!r}; choose from: {', '.join(RECIPES)}, or a .json file")
    values = read_json(path)
    try:
        return recipe_from(values)
    except ValueError as error:
        raise ValueError(f"the recipe {path}: {error}") from error


def recipe_from(values: dict) -> Recipe:
    """A recipe from its fields; ValueError for a field that there is not."""
    known = [entry.name for entry in fields(Recipe)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"there is no field {unknown[0]!r}; choose from: {', '.join(known)}")
    return Recipe(**values)


def changed(recipe: Recipe, changes: list[str]) -> Recipe:
    """A recipe with fields replaced: "steps=1000", "unet.channels=64", "prediction_type=epsilon".

    A value is JSON, or else a word. ValueError for what is no field, or no value of it.
    """
    values = asdict(recipe)
    for change in changes:
        name, equals, text = change.partition("=")
        *outer, last = name.split(".")
        if not equals or not last or len(outer) > 1 or (outer and outer[0] not in ("unet", "schedule")):
            raise ValueError(
                f"{change!r} is no change of a recipe; write such as steps=1000, unet.channels=64"
            )
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        (values[outer[0]] if outer else values)[last] = value
    return recipe_from(values)


def _checked(name: str, value: object, hint: object) -> object:
    """The value in the field's type; a whole number will do for a float, a list for a tuple."""
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list of numbers, not {value!r}")
        return tuple(_checked(name, number, float) for number in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint is float and number and math.isfinite(value):
        return float(value)
    if not isinstance(value, hint) or isinstance(value, bool) != (hint is bool) or hint is float:
        kinds = {float: "a finite number", int: "a whole number", bool: "true or false", dict: "an object"}
        kind = kinds.get(hint, "a word")
        raise ValueError(f"{name} must be {kind}, not {value!r}")
    return value


def _require(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, not {value}")
