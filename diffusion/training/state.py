"""The state of a training run in one file, from which the run continues exactly as if it had not stopped."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..models.class_names import check_names
from ..models.config import UNetConfig
from ..storage.atomic import replacing
from ..storage.reading import add_tensors, load_weights, name_of, open_regular, read_safetensors
from ..utils.errors import one_line
from ..utils.validation import number, whole_number
from .fine_tuning import ImagesSeen
from .log_line import LogLine
from .recipe import Recipe, recipe_from
from .trainer import Trainer

# Fields of a recipe that decide what the tensors of its state mean, and those that decide the scale of the
# loss.
FIXED = ("unet", "schedule", "prediction_type", "optimizer", "ema_decay", "more_ema_decays")
LOSS = ("loss_weighting", "min_snr_gamma", "vlb_weight")


def save_state(trainer: Trainer, path: Path) -> None:
    """Writes weights, averages, the optimizer's state and all else that decides the next steps.

    The file is written whole or not at all. ValueError if it cannot be written.
    """
    tensors = {}
    for name, parameter in trainer.model.unet.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in trainer.optimizer.state(name).items():
            tensors[f"adam.{key}.{name}"] = value
    for index, average in enumerate(trainer.averages.values()):
        tensors |= {f"ema{index}.{name}": value for name, value in average.unet.named_parameters()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    about = {
        "recipe": asdict(trainer.recipe),
        "data": trainer.data_digest,
        "step": trainer.step,
        "seconds": trainer.seconds,
        "images": trainer.images_seen.own,
        "images_before": trainer.images_seen.before,
        "first_loss": trainer.log_line.first_loss,
        "losses": [loss.item() for loss in trainer.log_line.losses],
        "norms": [norm.item() for norm in trainer.log_line.norms],
        "scaler": trainer.scaler.state_dict(),
        "class_names": trainer.model.class_names,
        "command": trainer.command,
    }
    text = json.dumps(about)
    with replacing(path) as (temporary,):
        save_file(tensors, temporary, metadata={"training": text, "sha256": _digest(text, tensors)})


def _digest(about: str, tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of all that a state holds, in hexadecimal: a file cannot hold its own digest."""
    digest = hashlib.sha256(about.encode())
    add_tensors(digest, tensors)
    return digest.hexdigest()


def _comparable(recipe: Recipe) -> dict:
    """The fields of a recipe, with all of the UNet's: older states lack the fields that came later."""
    return asdict(recipe) | {"unet": UNetConfig.from_dict(recipe.unet).to_dict()}


def load_state(trainer: Trainer, path: Path, accept_changes: bool = False) -> None:
    """Loads a state that `save_state` wrote into a trainer.

    accept_changes: accept other data, and a recipe that differs in other fields than FIXED. ValueError if the
    file is damaged, or belongs to another recipe or other data.
    """
    about = read_state(path)
    recipe, former = _comparable(trainer.recipe), _comparable(about["recipe"])
    differing = [key for key in recipe if former[key] != recipe[key]]
    refused = [key for key in differing if not accept_changes or key in FIXED]
    if refused:
        fixed = any(key in FIXED for key in refused)
        way = "choose another folder by --out" if fixed else "--accept-changes (accept_changes=True) takes it"
        raise ValueError(f"{path} is of another recipe: it differs in {', '.join(refused)}; {way}")
    if about["data"] != trainer.data_digest and not accept_changes:
        raise ValueError(
            f"{path} is of a run on other images or labels; --accept-changes (accept_changes=True) takes them"
        )
    groups: dict[str, dict[str, torch.Tensor]] = {}
    tensors = read_safetensors(path)
    _check_digest(path, tensors)
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = tensor
    load_weights(trainer.model.unet, groups.get("model", {}), path)
    for index, average in enumerate(trainer.averages.values()):
        load_weights(average.unet, groups.get(f"ema{index}", {}), path)
    moments = groups.get("adam", {})
    for name, parameter in trainer.model.unet.named_parameters():
        keys = trainer.optimizer.keys(name)
        state = {key: moments[f"{key}.{name}"] for key in keys if f"{key}.{name}" in moments}
        if not state and (about["step"] == 0 or about["scaler"]):
            continue  # no step yet: a step whose scaled gradients overflow is left out
        shapes = {key: torch.Size() if key == "step" else parameter.shape for key in keys}
        if {key: value.shape for key, value in state.items()} != shapes:
            raise ValueError(f"{path} is damaged: it lacks the optimizer's state of {name}")
        squares = state.get("exp_avg_sq", torch.zeros(1, device="cpu"))
        if any(value.isnan().any() for value in state.values()) or (squares < 0).any():
            raise ValueError(
                f"{path} is damaged: the optimizer's state of {name} holds NaN or negative squares"
            )
        trainer.optimizer.set_state(name, state)
    if trainer.scaler.is_enabled() and about["scaler"]:
        try:
            trainer.scaler.load_state_dict(about["scaler"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: it lacks the scale of the loss ({error})") from error
    trainer.step, trainer.seconds = about["step"], about["seconds"]
    trainer.images_seen = about["images_seen"]
    trainer.log_line = LogLine(
        torch.tensor(about["losses"], device=trainer.device),
        torch.tensor(about["norms"], device=trainer.device),
        about["first_loss"] if set(differing).isdisjoint(LOSS) else None,
    )


def _check_digest(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """ValueError if the tensors are not those that were saved. Older states hold no digest."""
    metadata = _metadata(path)
    if "sha256" in metadata and metadata["sha256"] != _digest(metadata["training"], tensors):
        raise ValueError(f"{path} is damaged: it has another SHA-256 than when it was saved")


def _metadata(path: Path) -> dict[str, str]:
    with open_regular(path) as file, safe_open(name_of(file, path), framework="pt") as tensors:
        return tensors.metadata() or {}


def read_state(path: Path) -> dict:
    """The entries of a training state other than tensors, checked; "recipe" is a Recipe.

    ValueError if the file is missing or damaged, or is not a training state.
    """
    if not os.path.lexists(path):
        raise ValueError(f"there is no run to resume: {path} is missing; begin one without --resume")
    try:
        about = json.loads(_metadata(path)["training"])
        recipe, first = recipe_from(dict(about["recipe"])), about["first_loss"]
        step, names = whole_number("step", about["step"], 0, recipe.steps), about.get("class_names")
        scaler, losses, norms = dict(about["scaler"]), list(about["losses"]), list(about["norms"])
        if not len(losses) == len(norms) <= step:
            raise ValueError(f"it holds {len(losses)} losses and {len(norms)} norms of {step} steps")
        return {
            "recipe": recipe,
            "data": str(about["data"]),
            "step": step,
            "seconds": number("seconds", about["seconds"], 0),
            "first_loss": None if first is None else number("first_loss", first),
            "losses": [number("losses", loss) for loss in losses],
            # The gradient of a scaled loss may overflow; such a step was left out.
            "norms": [float(norm) if scaler else number("norms", norm, 0) for norm in norms],
            "scaler": scaler,
            # Older states lack what follows.
            "images_seen": ImagesSeen(
                whole_number("images", about.get("images", step * recipe.batch_size), 0),
                whole_number("images_before", about.get("images_before", 0), 0),
            ),
            "class_names": names and check_names(names, recipe.unet.get("num_classes")),
            "command": dict(about.get("command", {})),
        }
    except (
        SafetensorError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise ValueError(f"{path} is no training state, or damaged: {one_line(error)}") from error
