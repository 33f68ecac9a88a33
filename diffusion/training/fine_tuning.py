"""Fine-tuning: a run that starts from the weights of a model instead of random ones."""

from dataclasses import replace

import torch

from ..ddpm import DDPM
from ..models.network import Network
from ..models.registry import architecture
from ..models.unet import UNet, UNetConfig
from ..process.value_range import SIGNED
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


def images_seen(model: DDPM) -> int | None:
    """The images that a model was trained on, by its metadata, with those of the model that its training
    started from; None if these do not tell."""
    about = model.metadata.get("training")
    if not isinstance(about, dict):
        return None
    step, size, before = about.get("step"), about.get("batch_size"), about.get("images_before", 0)
    if not all(type(number) is int and number >= 0 for number in (step, size, before)):
        return None
    return before + step * size


@torch.no_grad()
def start_from(unet: UNet, model: Network) -> None:
    """Copies the weights of a model's UNet into one of the same architecture.

    If the number of classes differs, the embeddings of the classes keep their random weights, and only the
    null label's embedding is copied. ValueError for another architecture, with the name of the first weight
    that differs.
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
    for name in weights.keys() & found.keys():
        if weights[name].shape == found[name].shape:
            weights[name].copy_(found[name])
    null, null_there = unet.config.null_label, model.config.null_label
    if CLASSES in weights and CLASSES in found and None not in (null, null_there):
        weights[CLASSES][null].copy_(found[CLASSES][null_there])
