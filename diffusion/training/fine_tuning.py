"""Fine-tuning: a run that starts from the weights of a model instead of random ones."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..ddpm import DDPM
from ..models.network import Network
from ..models.registry import architecture
from ..models.unet import UNet, UNetConfig
from ..process.value_range import SIGNED
from ..utils.validation import whole_number
from .recipe import Recipe

CLASSES = "label_embedding.weight"
CLASS_FIELDS = {"num_classes": None, "has_null_label": True}  # fields of UNetConfig and their defaults


def recipe_for(model: DDPM, recipe: Recipe) -> Recipe:
    """The recipe with the network, the noise schedule and the prediction type of a model.

    The number of classes stays the recipe's: it belongs to the data. ValueError for a model that a recipe
    cannot describe: one with another network than a UNet, or of images that are not diffused in [-1, 1].
    """
    if not isinstance(model.unet.config, UNetConfig):
        raise ValueError(f"recipes train UNets, and this model has a {architecture(model.unet.config)}")
    if model.diffused_range != SIGNED:
        low, high = model.diffused_range
        raise ValueError(f"recipes train on images in [-1, 1]; this model's are in [{low:g}, {high:g}]")
    classes = {name: recipe.unet.get(name, default) for name, default in CLASS_FIELDS.items()}
    return replace(
        recipe,
        unet=model.unet.config.to_dict() | classes,
        schedule=model.schedule.to_config(),
        prediction_type=model.prediction_type,
    )


class ImagesSeen(NamedTuple):
    """own: images of a model's run. before: those of the model whose weights the run started from."""

    own: int
    before: int

    @property
    def total(self) -> int:
        return self.own + self.before


def images_seen(model: DDPM) -> ImagesSeen | None:
    """The images that a model was trained on, by its metadata; None if these do not tell."""
    about = model.metadata.get("training")
    if not isinstance(about, dict):
        return None
    try:
        own, before = about.get("images"), whole_number("images_before", about.get("images_before", 0), 0)
        if own is None:  # older models do not hold it
            step, size = (whole_number(name, about.get(name), 0) for name in ("step", "batch_size"))
            own = step * size
        seen = ImagesSeen(whole_number("images", own, 0), before)
        whole_number("images", seen.total)
    except ValueError:
        return None
    return seen


@torch.no_grad()
def start_from(
    unet: UNet, model: Network, names: Sequence[str] | None = None, names_there: Sequence[str] | None = None
) -> None:
    """Copies the weights of a model's UNet into one of the same architecture.

    names, names_there: of the classes of `unet` and `model`. A class has the embedding of the class of its
    name. If no name is in both, it has that of its number if both have as many classes, and else keeps its
    random weights. ValueError for another architecture, with the name of the first weight that differs.
    """
    weights, found = dict(unet.named_parameters()), dict(model.named_parameters())
    different = [name for name in weights.keys() ^ found.keys() if name != CLASSES]
    different += [
        name for name in weights.keys() & found.keys() - {CLASSES} if weights[name].shape != found[name].shape
    ]
    if different:
        name = min(different)
        shapes = [list(own[name].shape) if name in own else "missing" for own in (weights, found)]
        raise ValueError(
            f"the model to start from is of another architecture: {name} is {shapes[1]} there and "
            f"{shapes[0]} in the recipe"
        )
    for name in weights.keys() & found.keys() - {CLASSES}:
        weights[name].copy_(found[name])
    if CLASSES not in weights or CLASSES not in found:
        return
    known = {name: number for number, name in enumerate(names_there or ())}
    numbers = {number: known[name] for number, name in enumerate(names or ()) if name in known}
    if not numbers and unet.config.num_classes == model.config.num_classes:
        numbers = {number: number for number in range(unet.config.num_classes or 0)}
    null, null_there = unet.config.null_label, model.config.null_label
    if null is not None and null_there is not None:
        numbers[null] = null_there
    for number, there in numbers.items():
        weights[CLASSES][number].copy_(found[CLASSES][there])
