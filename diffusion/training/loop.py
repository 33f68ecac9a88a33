"""The training loop: progress, log, validation, sample grids and checkpoints."""

import contextlib
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..ddpm import DDPM
from ..storage.atomic import check_writable, remove_leftovers
from ..storage.images import save_grid
from ..storage.locks import holder, locked
from ..utils.plain_pytorch import tell_of_plain_pytorch
from ..utils.validation import whole_number
from .distributed import any_rank, check_ranks_agree, explain_lost_rank, shared_gradients
from .log_file import LogFile
from .signals import stop_signals
from .state import load_state, read_state, save_state
from .trainer import Trainer

STATE, LOCK = "state.safetensors", ".lock"
MODEL_FILES = ("config.json", "model.safetensors")
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
    sample_every: int = 2500,
    progress: bool = True,
) -> DDPM:
    """Trains to the recipe's last step and returns the averaged model.

    The folder `out` gets `config.json` and `model.safetensors` (the averaged model, which `diffusion.load`
    reads), `ema-<decay>/` with such a model for each further average, `state.safetensors` (to resume from),
    `log.csv`, and `samples/` with grids of all classes. All files but the log are written whole or not at
    all. With several ranks, the first writes. Ctrl-C and SIGTERM end the run, saved, after the step in which
    they come. If a grid or a row of the log cannot be written, the run is saved before the error is raised.

    resume: continue the run in `out`.
    accept_changes: resume also with other data, or with a recipe of another length, learning rate or loss;
        `state.FIXED` names the fields that may not differ.
    log_every, validate_every, save_every, sample_every: steps between rows of the log, validation losses,
        checkpoints and grids; each is also due after the last step.
    progress: show a bar with images/s.

    ValueError if `out` holds a run or a model and resume is False; if it holds no run, or one of another
    recipe or other data, and resume is True; if another process trains into it; if it cannot be written; if
    the ranks do not agree; or if the loss or gradient is no longer finite, or the loss grew to ten times its
    first value: then the message names the step, and the step to resume from. KeyboardInterrupt after a
    signal.
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
        check_ranks_agree(trainer, problem)
        if trainer.ranks.rank == 0:
            tell_of_plain_pytorch(trainer.device)
        return _loop(trainer, out, resume, options, progress)


def _begin(
    trainer: Trainer,
    out: Path,
    resume: bool,
    accept_changes: bool,
    sample_every: int,
    held: contextlib.ExitStack,
) -> None:
    """Checks that `out` may be trained into, loads the state to resume, and locks `out` on the first rank."""
    state = out / STATE
    step = read_state(state)["step"] if resume else 0  # raises before a folder is made
    if trainer.ranks.rank == 0:
        first_grid = min((step // sample_every + 1) * sample_every, trainer.recipe.steps)
        models = [folder / name for folder in _average_folders(trainer, out).values() for name in MODEL_FILES]
        check_writable(state, out / "log.csv", *models, _grid_path(out, first_grid))
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


def _loop(trainer: Trainer, out: Path, resume: bool, every: dict[str, int], progress: bool) -> DDPM:
    recipe = trainer.recipe
    bar = tqdm(
        total=recipe.steps * recipe.batch_size,
        initial=trainer.step * recipe.batch_size,
        unit=" images",
        unit_scale=True,
        disable=not (progress and trainer.ranks.rank == 0),
    )
    with (
        bar,
        torch.random.fork_rng(),  # the steps seed PyTorch's global generators
        stop_signals() as signals,
        explain_lost_rank(trainer, out / STATE),
        shared_gradients(trainer),
    ):
        run = Run(trainer, out, every, signals, bar, resume)
        if resume:
            run.catch_up()
        while trainer.step < recipe.steps:
            trainer.train_step()
            bar.update(recipe.batch_size)
            complete = run.log() if run.is_due("log") else True
            if run.is_due("save"):
                run.save()
            if run.is_due("sample"):
                complete &= run.sample()
            if run.should_stop(complete):
                run.save_if_needed()
                raise KeyboardInterrupt
    return trainer.ema


class Run:
    """A run between its steps: logs, saves and samples into the folder `out`, and tells when to stop.

    every: the steps between rows of the "log", validation losses ("validate"), checkpoints ("save") and grids
    ("sample"). signals: the received ones, see `stop_signals`. All ranks call the same methods; the first
    writes.
    """

    def __init__(
        self, trainer: Trainer, out: Path, every: dict[str, int], signals: list[int], bar: tqdm, resumed: bool
    ):
        self.trainer, self.out, self.every, self.signals, self.bar = trainer, out, every, signals, bar
        self.writes = trainer.ranks.rank == 0
        self.saved_step = trainer.step if resumed else None
        self.seconds_before, self.started = trainer.seconds, time.perf_counter()
        if self.writes:
            for folder in (out, out / "samples", *out.glob("ema-*")):
                remove_leftovers(folder)
            logged = trainer.step - len(trainer.log_line.losses) if trainer.step else None
            self.log_file = LogFile(out / "log.csv", logged)

    @property
    def seconds(self) -> float:
        """How long the run has trained, in all of its parts."""
        return self.seconds_before + time.perf_counter() - self.started

    def is_due(self, name: str) -> bool:
        """Whether one of `every` falls on the present step; each does on the last step, none on step 0."""
        step = self.trainer.step
        return step > 0 and (step % self.every[name] == 0 or step == self.trainer.recipe.steps)

    def log(self) -> bool:
        """Adds a row to the log; False, without one, if a signal cut its validation loss short."""
        trainer = self.trainer
        self.check_finite()
        validation = None
        if self.writes and trainer.validation is not None and self.is_due("validate"):
            validation = trainer.validation_loss(stopping=self.signals)
            if validation is None:
                return False
        loss, norm = trainer.log_line.finish()
        if self.writes:
            rate = trainer.recipe.learning_rate_at(trainer.step - 1)
            try:
                self.log_file.add(trainer.step, loss, validation, rate, norm, self.seconds)
            except ValueError:
                self.save()
                raise
            shown = {"loss": f"{loss:.4f}"}
            self.bar.set_postfix(shown | ({} if validation is None else {"val": f"{validation:.4f}"}))
        return True

    def check_finite(self) -> None:
        """ValueError, which says what there is to resume from, if the training has diverged."""
        try:
            self.trainer.check_finite()
        except ValueError as error:
            if self.saved_step is None:
                raise ValueError(f"{error}; there is no checkpoint yet; {ADVICE}") from None
            raise ValueError(
                f"{error}; {self.out / STATE} holds step {self.saved_step}, the last good one; {ADVICE}, "
                "with --resume --accept-changes"
            ) from None

    def save(self) -> None:
        """Writes the state and the averaged models, unless the training has diverged."""
        self.check_finite()
        self.trainer.seconds = self.seconds
        self.saved_step = self.trainer.step
        if self.writes:
            save_state(self.trainer, self.out / STATE)
            self.save_averages()

    def save_if_needed(self) -> None:
        """Saves, unless the present step is saved already."""
        if self.saved_step != self.trainer.step:
            self.save()

    def save_averages(self) -> None:
        """Writes each averaged model into its folder."""
        trainer = self.trainer
        about = {**asdict(trainer.recipe), "step": trainer.step, "seconds": trainer.seconds}
        for decay, folder in _average_folders(trainer, self.out).items():
            trainer.averages[decay].save(folder, training={**about, "ema_decay": decay})

    def sample(self) -> bool:
        """Draws the grid of the present step; False, without one, if a signal came. Saves before an error."""
        if not self.writes:
            return True
        try:
            return _save_samples(self.trainer.ema, self.grid, self.signals)
        except Exception:  # such as a folder that was removed, a full disk, too little memory
            self.save_if_needed()
            raise

    @property
    def grid(self) -> Path:
        """The file of the present step's grid."""
        return _grid_path(self.out, self.trainer.step)

    def catch_up(self) -> None:
        """Draws and logs what a killed run left undone; KeyboardInterrupt if a signal came meanwhile."""
        if self.writes:
            self.save_averages()
            if self.is_due("sample") and not self.grid.exists():
                self.sample()
        if self.trainer.log_line.losses and self.is_due("log"):
            self.log()
        if any_rank(self.trainer, bool(self.signals)):
            raise KeyboardInterrupt

    def should_stop(self, complete: bool) -> bool:
        """Whether a signal came on any rank, and something is left to do.

        complete: the present step lacks neither its row of the log nor its grid. Several ranks on other
        devices than the CPU ask each other only at steps that log or sample, because asking waits for the
        device.
        """
        trainer = self.trainer
        cheap = trainer.device.type == "cpu" or trainer.ranks.world_size == 1
        if not (cheap or self.is_due("log") or self.is_due("sample")):
            return False
        finished = trainer.step == trainer.recipe.steps and complete
        return any_rank(trainer, bool(self.signals)) and not finished


def _average_folders(trainer: Trainer, out: Path) -> dict[float, Path]:
    """The folders of the averaged models, by their decays: `out` itself for the recipe's ema_decay."""
    kept = trainer.recipe.ema_decay
    return {decay: out if decay == kept else out / f"ema-{decay:g}" for decay in trainer.averages}


def _grid_path(out: Path, step: int) -> Path:
    return out / "samples" / f"step-{step:07d}.png"


class _Stopped(Exception):
    """A signal came while a grid was sampled."""


def _save_samples(model: DDPM, path: Path, signals: list[int]) -> bool:
    """Draws a grid of all classes; False, without a grid, if a signal came before it was complete."""

    def check_signals(*step: object) -> None:
        if signals:
            raise _Stopped

    config = model.unet.config
    options: dict[str, Any] = {"sampler": "ddim", "steps": min(50, model.schedule.T)}
    options["callback"] = check_signals
    try:
        check_signals()
        if config.num_classes is None:
            x = model.sample(num_samples=20, **options)
        else:
            labels = [label for _ in range(2) for label in range(min(config.num_classes, 10))]
            x = model.sample(labels=labels, guidance_scale=2.0 if config.has_null_label else 1.0, **options)
    except _Stopped:
        return False
    save_grid(x, path)
    return True
