"""The training loop: progress, log, validation, sample grids, and checkpoints written whole or not at all."""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from ..ddpm import DDPM
from ..storage.atomic import check_writable, remove_leftovers, replacing
from ..storage.images import save_grid
from ..storage.locks import holder, locked
from ..storage.reading import read_text
from ..utils.validation import whole_number
from .distributed import agree, any_rank, losing_a_rank, shared_gradients
from .state import load_state, read_state, save_state
from .trainer import Trainer

STATE, LOCK = "state.safetensors", ".lock"
MODEL_FILES = ("config.json", "model.safetensors")
COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "seconds")
HEADER = ",".join(COLUMNS) + "\n"
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
    Before an error about a grid, or a line of the log, ends the run, its state is saved. Ctrl-C and SIGTERM
    end it after the step that it is in, saved. Of several ranks the first writes.

    accept_changes: resume a run of other data too, or of a recipe that differs in how long, how fast or by
    which loss it trains, not in what. ValueError if `out` holds a run or model and resume is False, if there
    is none and it is True, if it is of another recipe or other data, if another process trains into it, if it
    cannot be written, if the ranks do not agree, or if the loss or gradient is no longer finite or the loss
    grew to ten times its first value: then the message says at which step, and what is there to resume from.
    """
    options = {"log": log_every, "validate": validate_every, "save": save_every, "sample": sample_every}
    options = {name: whole_number(f"{name}_every", steps, 1) for name, steps in options.items()}
    out = Path(out)
    with contextlib.ExitStack() as held:
        problem = None
        try:
            _begin(trainer, out, resume, accept_changes, options["sample"], held)
        except ValueError as error:
            problem = error
        agree(trainer, problem)
        return _run(trainer, out, resume, options, progress)


def _begin(
    trainer: Trainer,
    out: Path,
    resume: bool,
    accept_changes: bool,
    sample_every: int,
    held: contextlib.ExitStack,
) -> None:
    """Sees to it that `out` may be trained into and, on the first rank, that no other process does."""
    state = out / STATE
    step = read_state(state)["step"] if resume else 0  # before a folder is made
    if trainer.ranks.rank == 0:
        first = min((step // sample_every + 1) * sample_every, trainer.recipe.steps)
        models = [folder / name for folder in _folders(trainer, out).values() for name in MODEL_FILES]
        check_writable(state, out / "log.csv", *models, _grid(out, first))
        if not held.enter_context(locked(out / LOCK)):
            raise ValueError(
                f"{out} is in use: {holder(out / LOCK)} trains into it; wait, or choose another folder"
            )
    if resume:
        load_state(trainer, state, accept_changes)
    elif os.path.exists(state):
        raise ValueError(f"{out} holds a run already; resume it, or choose another folder")
    elif any(os.path.exists(out / name) for name in MODEL_FILES):
        raise ValueError(f"{out} holds a model, which training would replace; choose another folder")


def _folders(trainer: Trainer, out: Path) -> dict[float, Path]:
    """Where the averages are saved, by their decays."""
    kept = trainer.recipe.ema_decay
    return {decay: out if decay == kept else out / f"ema-{decay:g}" for decay in trainer.averages}


def _grid(out: Path, step: int) -> Path:
    return out / "samples" / f"step-{step:07d}.png"


def _run(trainer: Trainer, out: Path, resume: bool, every: dict[str, int], progress: bool) -> DDPM:
    """The loop. A line of the log or a grid that a signal cut off is made when the run is resumed."""
    recipe, state, first_rank = trainer.recipe, out / STATE, trainer.ranks.rank == 0
    if first_rank:
        for folder in (out, out / "samples", *out.glob("ema-*")):
            remove_leftovers(folder)
    logged = trainer.step - len(trainer.losses) if trainer.step else None
    rows = _LogFile(out / "log.csv", logged) if first_rank else None
    started, before, saved = time.perf_counter(), trainer.seconds, trainer.step if resume else None

    def is_due(name: str) -> bool:
        return trainer.step > 0 and (trainer.step % every[name] == 0 or trainer.step == recipe.steps)

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
        for decay, folder in _folders(trainer, out).items():
            trainer.averages[decay].save(folder, training={**about, "ema_decay": decay})

    def check() -> None:
        if trouble := trainer.trouble():
            if saved is None:
                raise ValueError(f"{trouble}; there is no checkpoint yet; {ADVICE}")
            raise ValueError(
                f"{trouble}; {state} holds step {saved}, the last good one; {ADVICE}, with --resume "
                "--accept-changes"
            )

    def log() -> bool:
        """Adds a line to the log; False if a signal came before its validation loss was known."""
        check()
        validation = None
        if first_rank and trainer.validation is not None and is_due("validate"):
            validation = trainer.validation_loss(stopping=stopping)
            if validation is None:
                return False
        norm, mean = trainer.norms[-1].item(), trainer.finish_line()
        if first_rank:
            seconds = before + time.perf_counter() - started
            rate = recipe.learning_rate_at(trainer.step - 1)
            try:
                rows.add(trainer.step, mean, validation, rate, norm, seconds)
            except ValueError:
                save()
                raise
            shown = {"loss": f"{mean:.4f}"}
            bar.set_postfix(shown | ({} if validation is None else {"val": f"{validation:.4f}"}))
        return True

    grid = _grid(out, trainer.step)
    bar = tqdm(
        total=recipe.steps * recipe.batch_size,
        initial=trainer.step * recipe.batch_size,
        unit=" images",
        unit_scale=True,
        disable=not (progress and first_rank),
    )
    with bar, _repeatable(), _signals() as stopping, losing_a_rank(trainer, out), shared_gradients(trainer):
        if resume and first_rank:  # what a run that was killed may have had no time for
            save_averages()
            if is_due("sample") and not grid.exists():
                _save_samples(trainer.ema, grid, stopping)
        if resume and trainer.losses and is_due("log"):
            log()
        if resume and any_rank(trainer, bool(stopping)):
            raise KeyboardInterrupt
        while trainer.step < recipe.steps:
            trainer.train_step()
            bar.update(recipe.batch_size)
            line, last = is_due("log"), trainer.step == recipe.steps
            whole = not line or log()
            if is_due("save"):
                save()
            if first_rank and is_due("sample"):
                try:
                    whole &= _save_samples(trainer.ema, _grid(out, trainer.step), stopping)
                except Exception:  # a folder that was taken away, a full disk, too little memory
                    if saved != trainer.step:
                        save()
                    raise
            # Ranks on other devices than the CPU wait for the device when they ask each other.
            asks = line or is_due("sample") or trainer.device.type == "cpu" or trainer.ranks.world_size == 1
            if asks and any_rank(trainer, bool(stopping)) and not (last and whole):
                if saved != trainer.step:
                    save()
                raise KeyboardInterrupt
    return trainer.ema


class _LogFile:
    """log.csv, cut back to the line that a resumed run continues after, that of step `logged`.

    None begins a new one. A UserWarning if it ends before that step: it is continued all the same.
    """

    def __init__(self, path: Path, logged: int | None):
        self.path = path
        rows = [] if logged is None or not path.exists() else self._rows()
        rows = [(step, line) for step, line in rows if step <= logged]
        with replacing(path) as (temporary,):
            temporary.write_text("".join([HEADER, *(line for _, line in rows)]), encoding="utf-8")
        last = rows[-1][0] if rows else 0
        if last < (logged or 0):
            warnings.warn(
                f"{path} lacks lines: it ends at step {last}, and the run's last was {logged}", stacklevel=2
            )

    def _rows(self) -> list[tuple[int, str]]:
        """Steps and their lines but one that was cut off at the end; ValueError if it is no log."""
        header, *lines = read_text(self.path).splitlines(keepends=True) or [""]
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
        if header != HEADER:
            raise ValueError(f"{self.path} is no log of a training run; move it away to begin a new one")
        rows, last = [], 0
        for number, line in enumerate(lines, 2):
            values = line.split(",")
            if len(values) != len(COLUMNS) or not values[0].isdecimal() or len(values[0]) > 18:
                raise ValueError(f"{self.path} is damaged in line {number}; move it away to begin a new log")
            step = int(values[0])
            if step <= last:
                raise ValueError(
                    f"{self.path} is damaged in line {number}: step {step} does not come after {last}; "
                    "move it away to begin a new log"
                )
            rows.append((step, line))
            last = step
        return rows

    def add(self, step: int, *values: float | None) -> None:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(",".join([str(step), *("" if v is None else f"{v:.6g}" for v in values)]) + "\n")
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


class _Stopped(Exception):
    """A signal came while a grid was sampled."""


def _save_samples(model: DDPM, path: Path, stopping: list[int]) -> bool:
    """Draws a grid of every class; False, without one, if a signal came before it was whole."""

    def look(*step: object) -> None:
        if stopping:
            raise _Stopped

    config, options = model.unet.config, {"sampler": "ddim", "steps": min(50, model.schedule.T)}
    options["callback"] = look
    try:
        look()
        if config.num_classes is None:
            x = model.sample(num_samples=20, **options)
        else:
            labels = [label for _ in range(2) for label in range(min(config.num_classes, 10))]
            x = model.sample(labels=labels, guidance_scale=2.0 if config.has_null_label else 1.0, **options)
    except _Stopped:
        return False
    save_grid(x, path)
    return True
