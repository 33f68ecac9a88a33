"""The outlook of a training run: its steps, time and disk space."""

import os
import shutil
import time
from pathlib import Path

import torch

from ..utils.memory import amount
from ..utils.words import counted
from .trainer import Trainer

PROBED = 8  # images of the step that is timed on a CPU


def outlook(trainer: Trainer, name: str | None, done: int = 0) -> str:
    """One line: the recipe of this name, the network's parameters, the steps to go and their likely time.

    done: steps of the run that is resumed.
    """
    recipe, left = trainer.recipe, trainer.recipe.steps - done
    recipe_name = "" if name is None else f"recipe {name}: "
    parameters = trainer.model.unet.config.num_parameters
    size = f"{parameters / 1e6:.1f} M" if parameters >= 1e5 else f"{parameters:,}"
    text = f"{recipe_name}{size} parameters, {counted(left, 'step')} of {counted(recipe.batch_size, 'image')}"
    if recipe.steps <= recipe.warmup_steps:
        text = f"{text}, all in the warm-up of {recipe.warmup_steps}"
    seconds = seconds_per_step(trainer)
    return text if seconds is None else f"{text}, about {duration(left * seconds)} on {trainer.device}"


def seconds_per_step(trainer: Trainer) -> float | None:
    """The time of a training step, measured on blank images; None for a compiled network.

    On a CPU a few images are timed, after as many to warm up. The run is left as it was.
    """
    if trainer.network is not trainer.model.unet:  # compiling takes minutes
        return None
    share = -(-trainer.recipe.batch_size // trainer.ranks.world_size)
    count = min(share, trainer.micro_batch or share)
    if trainer.device.type == "cpu":
        count = min(count, PROBED)
    x = torch.zeros(count, *trainer.images.shape[1:], device=trainer.device)
    x = x.contiguous(memory_format=trainer.format)
    zeros = torch.zeros(count, dtype=torch.int64, device=trainer.device)
    seconds = 0.0
    with torch.random.fork_rng():
        for _ in range(2):
            start = time.perf_counter()
            loss = trainer.loss(x, None if trainer.labels is None else zeros, zeros, torch.ones_like(x))
            loss.backward()
            loss.item()  # waits for the device
            seconds = time.perf_counter() - start
    for parameter in trainer.model.unet.parameters():
        parameter.grad = None
    return seconds * share / count


def disk_use(trainer: Trainer, out: str | os.PathLike, done: int = 0) -> str:
    """One line: the disk space that a run takes in the folder `out`, beside what it holds already.

    While a checkpoint is written, the former one is still there. done: steps of the run that is resumed.
    ValueError if the disk has less.
    """
    parameters = sum(weight.numel() for weight in trainer.model.unet.parameters())
    moments = sum(
        weight.numel() * (len(trainer.optimizer.keys(name)) - ("step" in trainer.optimizer.keys(name)))
        for name, weight in trainer.model.unet.named_parameters()
    )
    averages = len(trainer.averages)
    state = 4 * (parameters * (1 + averages) + moments)
    needed = state + 4 * parameters
    if done == 0:
        needed += state + 4 * parameters * averages
    folder = Path(os.path.abspath(out))
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(f"{out} needs up to {amount(needed)}, and its disk has {amount(free)} free")
    return f"{out}: up to {amount(needed)} on disk, of {amount(free)} free"


def duration(seconds: float) -> str:
    """A time in words, such as "40 seconds" or "9.3 hours"."""
    for unit, size in (("second", 1), ("minute", 60)):
        if seconds < 90 * size:
            return counted(max(1, round(seconds / size)), unit)
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 100 else f"{hours / 24:,.0f} days"
