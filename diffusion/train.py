"""The training loop: progress, log, validation, sample grids, and checkpoints written whole or not at all."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from .ddpm import DDPM
from .files import check_writable, remove_leftovers, replacing
from .images import save_grid
from .parallel import agree, any_rank, losing_a_rank, shared_gradients
from .reading import read_text
from .trainer import Trainer
from .training_state import load_state, save_state

MODEL_FILES = ("config.json", "model.safetensors")
COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "seconds")
ADVICE = "try a lower learning rate, a longer warm-up, or float32 instead of autocast"


def train(
    trainer: Trainer,
    out: str | os.PathLike,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    log_every: int = 50,
    validate_every: int = 500,
    save_every: int = 500,
    sample_every: int = 1000,
    progress: bool = True,
) -> DDPM:
    """Trains to the recipe's last step and returns the averaged model.

    Into the folder `out`: `config.json` and `model.safetensors` (the averaged model, which `diffusion.load`
    reads), `ema-<decay>/` with such a model for each further average, `state.safetensors` (to resume from),
    `log.csv`, and `samples/` with a grid of every class. All but the log are written whole or not at all.
    Ctrl-C and SIGTERM end the run after the step that it is in, saved. Of several ranks the first writes.

    accept_changes: resume a run of other data too, or of a recipe that differs in how long, how fast or by
    which loss it trains, not in what. ValueError if `out` holds a run or model and resume is False, if there
    is none and it is True, if it is of another recipe or other data, if it cannot be written, if the ranks do
    not agree, or if the loss or gradient is no longer finite or the loss grew to ten times its first value:
    then the message says at which step, and what is there to resume from.
    """
    out = Path(out)
    state, log = out / "state.safetensors", out / "log.csv"
    first_rank = trainer.ranks.rank == 0
    if resume:
        load_state(trainer, state, accept_changes)
    elif state.exists():
        raise ValueError(f"{out} holds a run already; resume it, or choose another folder")
    elif any((out / name).exists() for name in MODEL_FILES):
        raise ValueError(f"{out} holds a model, which training would replace; choose another folder")
    agree(trainer)
    if first_rank:
        check_writable(state)
        remove_leftovers(out)
    recipe = trainer.recipe
    rows = _LogFile(log, trainer.step) if first_rank else None
    started, before, saved = time.perf_counter(), trainer.seconds, trainer.step if resume else None

    def save() -> None:
        nonlocal saved
        check()
        trainer.seconds = before + time.perf_counter() - started
        saved = trainer.step
        if first_rank:
            save_state(trainer, state)
            save_averages()

    def save_averages() -> None:
        about = {**asdict(recipe), "step": trainer.step, "seconds": trainer.seconds}
        for decay, average in trainer.averages.items():
            folder = out if average is trainer.ema else out / f"ema-{decay:g}"
            average.save(folder, training={**about, "ema_decay": decay})

    def check() -> None:
        if trouble := trainer.trouble():
            if saved is None:
                raise ValueError(f"{trouble}; there is no checkpoint yet; {ADVICE}")
            raise ValueError(
                f"{trouble}; {state} holds step {saved}, the last good one; {ADVICE}, with --resume "
                "--accept-changes"
            )

    if resume and first_rank:  # a run that was killed may have had no time for the models of its last state
        save_averages()

    bar = tqdm(
        total=recipe.steps * recipe.batch_size,
        initial=trainer.step * recipe.batch_size,
        unit=" images",
        unit_scale=True,
        disable=not (progress and first_rank),
    )
    with bar, _repeatable(), _signals() as stopping, losing_a_rank(trainer, out), shared_gradients(trainer):
        while trainer.step < recipe.steps:
            trainer.train_step()
            bar.update(recipe.batch_size)
            step, last = trainer.step, trainer.step == recipe.steps
            line = step % log_every == 0 or last
            if line:
                check()
                norm = trainer.norms[-1].item()
                mean = trainer.finish_line()
            validated = line and trainer.validation is not None and (step % validate_every == 0 or last)
            if line and first_rank:
                validation = trainer.validation_loss() if validated else None
                seconds = before + time.perf_counter() - started
                rows.add(step, mean, validation, recipe.learning_rate_at(step - 1), norm, seconds)
                shown = {"loss": f"{mean:.4f}"}
                bar.set_postfix(shown | ({"val": f"{validation:.4f}"} if validated else {}))
            if first_rank and (step % sample_every == 0 or last):
                _save_samples(trainer.ema, out / "samples" / f"step-{step:07d}.png")
            stop = any_rank(trainer, bool(stopping)) if line or trainer.device.type == "cpu" else False
            if step % save_every == 0 or last or stop:
                save()
            if stop and not last:
                raise KeyboardInterrupt
    return trainer.ema


class _LogFile:
    """log.csv, cut back to the step that a resumed run continues from."""

    def __init__(self, path: Path, step: int):
        self.path = path
        lines = read_text(path).splitlines(keepends=True)[1:] if step and path.exists() else []
        kept = [line for line in lines if self._is_whole(line) and int(line.split(",")[0]) <= step]
        with replacing(path) as (temporary,):
            temporary.write_text("".join([",".join(COLUMNS) + "\n", *kept]))

    @staticmethod
    def _is_whole(line: str) -> bool:
        values = line.split(",")
        return len(values) == len(COLUMNS) and values[0].isdigit() and line.endswith("\n")

    def add(self, *values: float | None) -> None:
        try:
            with self.path.open("a") as file:
                file.write(",".join("" if v is None else f"{v:.6g}" for v in values) + "\n")
        except OSError as error:
            raise ValueError(f"cannot write {self.path}: {error.strerror}") from error


@contextlib.contextmanager
def _repeatable() -> Iterator[None]:
    """The steps seed PyTorch's global generators; give the caller's back afterwards."""
    with torch.random.fork_rng():
        yield


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The Ctrl-Cs and SIGTERMs that came: a step is finished before the first counts, not before the second.

    Only a program's main thread may ask for signals; in another one this list stays empty.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _save_samples(model: DDPM, path: Path) -> None:
    config, options = model.unet.config, {"sampler": "ddim", "steps": min(50, model.schedule.T)}
    if config.num_classes is None:
        x = model.sample(num_samples=20, **options)
    else:
        labels = [label for _ in range(2) for label in range(min(config.num_classes, 10))]
        x = model.sample(labels=labels, guidance_scale=2.0 if config.has_null_label else 1.0, **options)
    save_grid(x, path)
