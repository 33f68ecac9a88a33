"""A training run between its steps: log, validation, sample grids, measures and checkpoints in a folder."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..ddpm import DDPM
from ..inference.loop import Callback
from ..storage.atomic import remove_leftovers
from ..storage.images import save_grid
from .distributed import any_rank
from .log_file import COLUMNS, LogFile
from .signals import Stopped
from .state import save_state
from .tensorboard_log import TensorBoardLog
from .trainer import Trainer

STATE = "state.safetensors"
Measure = Callable[[DDPM, Callback], float]
MEASURED = ("step", "distance")  # columns of distances.csv
FIRST_SAVE = 5.0  # seconds that the first checkpoint may take
FITS = (0.1, 0.5)  # shares of the minutes after which the steps are fitted to the rest
SPARE = 0.04  # share of the minutes for the last validation and grid
LEAST_TIMED = 5  # steps that give a rate
ADVICE = "try a lower learning rate, a longer warm-up, or float32 instead of autocast"


class Run:
    """A run between its steps: logs, saves and samples into the folder `out`, and tells when to stop.

    every: the steps between rows of the "log", validation losses ("validate"), checkpoints ("save"), grids
    ("sample") and measures ("measure"). measure, tensorboard, minutes, save_minutes, fit_steps: see
    `loop.train`.
    signals: the received ones, see `stop_signals`. All ranks call the same methods; the first writes.
    """

    def __init__(
        self,
        trainer: Trainer,
        out: Path,
        every: dict[str, int],
        signals: list[int],
        bar: tqdm,
        resumed: bool,
        measure: Measure | None,
        tensorboard: bool,
        minutes: float | None = None,
        save_minutes: float | None = None,
        fit_steps: bool = False,
    ):
        self.trainer, self.out, self.every, self.signals, self.bar = trainer, out, every, signals, bar
        self.writes = trainer.ranks.rank == 0
        self.saved_step = trainer.step if resumed else None
        self.seconds_before, self.started = trainer.seconds, time.perf_counter()
        self.minutes, self.save_minutes, self.saved_at = minutes, save_minutes, self.started
        self.stopping = _Stopping(signals, None if minutes is None else self.started + 60 * minutes)
        self.saving, self.longest = FIRST_SAVE, 0.0  # seconds of the last checkpoint and of the slowest step
        self.stepped = False  # whether a step was timed
        self.fits = list(FITS) if fit_steps else []
        self.timed_from: tuple[int, float] | None = (
            None  # the first step that counts for the rate, and its end
        )
        if self.writes:
            for folder in (out, out / "samples", *out.glob("ema-*")):
                remove_leftovers(folder)
            logged = trainer.step - len(trainer.log_line.losses) if trainer.step else None
            self.log_file = LogFile(out / "log.csv", logged)
            self.measure, self.board = measure, None
            if measure is not None:
                former = trainer.step or None
                self.distances = LogFile(out / "distances.csv", former, MEASURED, complete=False)
            if tensorboard:
                self.board = TensorBoardLog(out / "tensorboard", trainer.step or None)

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
            validation = trainer.validation_loss(stopping=self.stopping)
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
            steps = self.bar.format_dict["rate"] or 0.0  # of the last seconds
            if self.board is not None:
                values = (loss, validation, rate, norm, self.seconds)
                self.board.add(trainer.step, **dict(zip(COLUMNS[1:], values, strict=True)))
            shown = {"images/s": f"{steps * trainer.recipe.batch_size:.1f}", "loss": f"{loss:.4f}"}
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
        began = time.perf_counter()
        if self.writes:
            save_state(self.trainer, self.out / STATE)
            self.save_averages()
        self.saved_at = time.perf_counter()
        self.saving = self.saved_at - began

    def save_is_late(self) -> bool:
        """Whether the last checkpoint is save_minutes old."""
        return self.save_minutes is not None and time.perf_counter() - self.saved_at >= 60 * self.save_minutes

    def train_step(self) -> None:
        """Trains a step and times it; the first one, which compiles and tunes, says nothing of the others."""
        began = time.perf_counter()
        self.trainer.train_step()
        self.bar.update()
        if self.stepped:
            self.longest = max(self.longest, time.perf_counter() - began)
        self.stepped = True

    def is_out_of_time(self) -> bool:
        """Whether on any rank the steps until this is asked again, and a checkpoint, may exceed the minutes.

        All ranks get the same answer, and end after the same step.
        """
        if self.minutes is None or not self._may_ask_ranks():
            return False
        needed = self._steps_until_asked() * self.longest + self.saving
        return any_rank(self.trainer, time.perf_counter() + needed > self.started + 60 * self.minutes)

    def fit_steps(self) -> None:
        """Sets the recipe's steps to as many as the minutes hold at the rate so far; called after each step.

        The first step, which compiles and tunes, does not count for the rate. A recipe whose steps end before
        a fit gets more of them.
        """
        if not self.fits or self.minutes is None:
            return
        trainer, now, whole = self.trainer, time.perf_counter(), 60 * self.minutes
        if self.timed_from is None:
            self.timed_from = trainer.step, now
        first, since = self.timed_from
        early = now - self.started < self.fits[0] * whole or trainer.step - first < LEAST_TIMED
        if early and trainer.step < trainer.recipe.steps:
            return
        if not early:
            self.fits.pop(0)
        left = self.started + (1 - SPARE) * whole - now - 2 * self.saving
        more = max(1, int(left * (trainer.step - first) / max(now - since, 1e-9)))
        trainer.recipe = replace(trainer.recipe, steps=trainer.step + more)
        self.bar.total = trainer.recipe.steps

    def save_if_needed(self) -> None:
        """Saves, unless the present step is saved already."""
        if self.saved_step != self.trainer.step:
            self.save()

    def save_averages(self) -> None:
        """Writes each averaged model into its folder."""
        trainer = self.trainer
        about = {**asdict(trainer.recipe), "step": trainer.step, "seconds": trainer.seconds}
        about |= {"images": trainer.images_seen.own, "images_before": trainer.images_seen.before}
        for decay, folder in average_folders(trainer, self.out).items():
            others = [other for other in trainer.averages if other != decay]
            own = {"ema_decay": decay, "more_ema_decays": others}
            trainer.averages[decay].save(folder, training=about | own)

    def sample(self) -> bool:
        """Draws the grid of the present step; False, without one, if a signal came. Saves before an error."""
        if not self.writes:
            return True
        try:
            drawn = save_samples(self.trainer.ema, self.grid, self.stopping)
            if drawn and self.board is not None:
                self.board.add_grid(self.trainer.step, self.grid)
            return drawn
        except Exception:  # such as a folder that was removed, a full disk, too little memory
            self.save_if_needed()
            raise

    def measure_samples(self) -> bool:
        """Measures the present step; False, without a row, if a signal came. Saves before an error."""
        if not self.writes or self.measure is None:
            return True
        if self.stopping:
            return False
        try:
            with _until_signal(self.stopping) as check_signals:
                distance = self.measure(self.trainer.ema, check_signals)
                self.distances.add(self.trainer.step, distance)
                if self.board is not None:
                    self.board.add(self.trainer.step, distance=distance)
                return True
        except Exception:
            self.save_if_needed()
            raise
        return False

    @property
    def grid(self) -> Path:
        """The file of the present step's grid."""
        return grid_path(self.out, self.trainer.step)

    def catch_up(self) -> None:
        """Draws and logs what a killed run left undone; Stopped if a signal came meanwhile."""
        if self.writes:
            self.save_averages()
            if self.is_due("sample") and not self.grid.exists():
                self.sample()
            measured = self.measure is None or self.distances.last == self.trainer.step
            if self.is_due("measure") and not measured:
                self.measure_samples()
        if self.trainer.log_line.losses and self.is_due("log"):
            self.log()
        if any_rank(self.trainer, bool(self.signals)):
            raise Stopped(self.trainer.step)

    def should_stop(self, complete: bool) -> bool:
        """Whether a signal came on any rank, and something is left to do.

        complete: the present step lacks neither its row of the log nor its grid. Several ranks on other
        devices than the CPU ask each other only at steps that log or sample, because asking waits for the
        device.
        """
        trainer = self.trainer
        if not self._may_ask_ranks() or not any_rank(trainer, bool(self.signals)):
            return False
        # Only the first rank knows whether the step is complete.
        return trainer.step < trainer.recipe.steps or any_rank(trainer, not complete)

    def _may_ask_ranks(self) -> bool:
        return self._asks_after_each_step() or self.is_due("log") or self.is_due("sample")

    def _asks_after_each_step(self) -> bool:
        return self.trainer.device.type == "cpu" or self.trainer.ranks.world_size == 1

    def _steps_until_asked(self) -> int:
        """The number of steps from this one to the next after which ranks ask each other."""
        if self._asks_after_each_step():
            return 1
        step = self.trainer.step
        return min(every - step % every for every in (self.every["log"], self.every["sample"]))


def average_folders(trainer: Trainer, out: Path) -> dict[float, Path]:
    """The folders of the averaged models, by their decays: `out` itself for the recipe's ema_decay."""
    kept = trainer.recipe.ema_decay
    return {decay: out if decay == kept else out / f"ema-{decay:g}" for decay in trainer.averages}


def grid_path(out: Path, step: int) -> Path:
    return out / "samples" / f"step-{step:07d}.png"


class _Stopping:
    """Whether a signal came, or the end, by time.perf_counter, is past: true or false as it is asked."""

    def __init__(self, signals: list[int], end: float | None):
        self._signals, self._end = signals, end

    def __bool__(self) -> bool:
        return bool(self._signals) or (self._end is not None and time.perf_counter() > self._end)


class _SignalCame(Exception):
    """A signal came while images were sampled."""


@contextlib.contextmanager
def _until_signal(signals: object) -> Iterator[Callback]:
    """A callback for `DDPM.sample`; the block ends, without an error, at the first step after a signal."""

    def check_signals(*step: object) -> None:
        if signals:
            raise _SignalCame

    with contextlib.suppress(_SignalCame):
        yield check_signals


def save_samples(model: DDPM, path: Path, signals: object) -> bool:
    """Draws a grid of all classes; False, without a grid, if a signal came before it was complete."""
    if signals:
        return False
    config, captions = model.unet.config, None
    options: dict[str, Any] = {"sampler": "ddim", "steps": min(50, model.schedule.T)}
    with _until_signal(signals) as callback:
        options["callback"] = callback
        if config.num_classes is None:
            x = model.sample(num_samples=20, **options)
        else:
            labels = [label for _ in range(2) for label in range(min(config.num_classes, 10))]
            captions = model.class_names and [model.class_names[label] for label in labels]
            x = model.sample(labels=labels, guidance_scale=2.0 if config.has_null_label else 1.0, **options)
        save_grid(x, path, captions=captions)
        return True
    return False
