"""The training loop: progress, log, validation, sample grids, and checkpoints written whole or not at all."""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from .ddpm import DDPM
from .files import check_writable
from .images import save_grid
from .trainer import Trainer

COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "seconds")


def train(
    trainer: Trainer,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    log_every: int = 50,
    validate_every: int = 500,
    save_every: int = 500,
    sample_every: int = 1000,
    progress: bool = True,
) -> DDPM:
    """Trains to the recipe's last step and returns the averaged model.

    Into the folder `out`: `config.json` and `model.safetensors` (the averaged model, which `diffusion.load`
    reads), `state.safetensors` (to resume from), `log.csv`, and `samples/` with a grid of every class. All
    but the log are written whole or not at all. ValueError if `out` holds a run and resume is False, if there
    is none and it is True, if it cannot be written, or if the loss is no longer finite. Ctrl-C saves first.
    """
    out = Path(out)
    state, log = out / "state.safetensors", out / "log.csv"
    check_writable(state)
    if resume:
        trainer.load(state)
    elif state.exists():
        raise ValueError(f"{out} holds a run already; resume it, or choose another folder")
    recipe = trainer.recipe
    rows = _LogFile(log, trainer.step)
    started, before = time.perf_counter(), trainer.seconds

    def save() -> None:
        trainer.seconds = before + time.perf_counter() - started
        trainer.save(state)
        trainer.ema.save(out, training={**asdict(recipe), "step": trainer.step, "seconds": trainer.seconds})

    bar = tqdm(
        total=recipe.steps * recipe.batch_size,
        initial=trainer.step * recipe.batch_size,
        unit=" images",
        unit_scale=True,
        disable=not progress,
    )
    with bar, _repeatable():
        try:
            while trainer.step < recipe.steps:
                norm = trainer.train_step()
                bar.update(recipe.batch_size)
                step, last = trainer.step, trainer.step == recipe.steps
                if step % log_every == 0 or last:
                    mean, norm = torch.stack(trainer.losses).mean().item(), norm.item()
                    trainer.losses.clear()
                    if not (mean < float("inf")):
                        raise ValueError(
                            f"the loss is {mean} at step {step}; {_last_good(state)}; "
                            "try a lower learning rate or longer warm-up"
                        )
                    validated = trainer.validation is not None and (step % validate_every == 0 or last)
                    validation = trainer.validation_loss() if validated else None
                    seconds = before + time.perf_counter() - started
                    rows.add(step, mean, validation, recipe.learning_rate_at(step - 1), norm, seconds)
                    shown = {"loss": f"{mean:.4f}"}
                    bar.set_postfix(shown | ({"val": f"{validation:.4f}"} if validated else {}))
                if step % sample_every == 0 or last:
                    _save_samples(trainer.ema, out / "samples" / f"step-{step:07d}.png")
                if step % save_every == 0 or last:
                    save()
        except KeyboardInterrupt:
            save()
            raise
    return trainer.ema


class _LogFile:
    """log.csv, cut back to the step that a resumed run continues from."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = path.read_text().splitlines()[1:] if step and path.exists() else []
        kept = [line for line in lines if line.split(",")[0].isdigit() and int(line.split(",")[0]) <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([",".join(COLUMNS), *kept]) + "\n")

    def add(self, *values: float | None) -> None:
        with self.path.open("a") as file:
            file.write(",".join("" if v is None else f"{v:.6g}" for v in values) + "\n")


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """The steps seed PyTorch's global generators; give the caller's back afterwards."""
    with torch.random.fork_rng():
        yield


def _save_samples(model: DDPM, path: Path) -> None:
    classes = model.unet.config.num_classes
    if classes is None:
        x = model.sample(num_samples=20, sampler="ddim", steps=50)
    else:
        labels = [label for _ in range(2) for label in range(min(classes, 10))]
        x = model.sample(labels=labels, guidance_scale=2.0, sampler="ddim", steps=50)
    save_grid(x, path)


def _last_good(state: Path) -> str:
    return f"{state} holds the last good checkpoint" if state.exists() else "there is no checkpoint yet"
