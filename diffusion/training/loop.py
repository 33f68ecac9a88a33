"""The training loop: steps, and between them what `run.Run` does."""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..ddpm import DDPM
from ..storage.atomic import check_writable
from ..storage.locks import holder, locked
from ..utils.plain_pytorch import tell_of_plain_pytorch
from ..utils.validation import number, whole_number
from .distributed import check_ranks_agree, explain_lost_rank, shared_gradients
from .run import STATE, Measure, Run, average_folders, grid_path
from .signals import Stopped, stop_signals
from .state import load_state, read_state
from .trainer import Trainer

LOCK = ".lock"
MODEL_FILES = ("config.json", "model.safetensors")


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
    measure_every: int = 2500,
    measure: Measure | None = None,
    tensorboard: bool = False,
    progress: bool = True,
    minutes: float | None = None,
    save_minutes: float | None = None,
    fit_steps: bool = False,
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
    log_every, validate_every, save_every, sample_every, measure_every: steps between rows of the log,
        validation losses, checkpoints, grids and measures; each is also due after the last step.
    measure: called as measure(model, callback) with the averaged model and a callback for `DDPM.sample`,
        which ends it when a signal comes; its results are the rows of `distances.csv`.
    tensorboard: also write the log, the measures and the grids for TensorBoard, into the folder
        `tensorboard`.
    progress: show a bar of the steps, with images/s.
    minutes: ends the run early, saved, when so many minutes from now would be over with another step and a
        checkpoint; a validation, grid or measure that is not done by then is left out, and `resume` makes
        up for it. At least one step is taken. The model that is returned is that of the last step.
    save_minutes: also saves when the last checkpoint is so old.
    fit_steps: after a tenth and after half of the minutes, replaces the recipe's number of steps by as many
        as the minutes hold, so that the learning rate falls in time. For one rank.

    ValueError if `out` holds a run or a model and resume is False; if it holds no run, or one of another
    recipe or other data, and resume is True; if another process trains into it; if it cannot be written; if
    the ranks do not agree; or if the loss or gradient is no longer finite, or the loss grew to ten times its
    first value: then the message names the step, and the step to resume from. `signals.Stopped`, a
    KeyboardInterrupt, after a signal.
    """
    options = {"log": log_every, "validate": validate_every, "save": save_every, "sample": sample_every}
    options["measure"] = measure_every
    options = {name: whole_number(f"{name}_every", steps, 1) for name, steps in options.items()}
    for name, value in (("minutes", minutes), ("save_minutes", save_minutes)):
        if value is not None:
            number(name, value, above=0)
    if fit_steps and (minutes is None or trainer.ranks.world_size > 1):
        raise ValueError("fit_steps needs minutes to fit the steps to, and a single rank")
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
        limits = {"minutes": minutes, "save_minutes": save_minutes, "fit_steps": fit_steps}
        return _loop(trainer, out, resume, options, measure, tensorboard, progress, limits)


def check_steps(trainer: Trainer, out: str | os.PathLike, done: int) -> None:
    """ValueError if a run that is resumed has taken more steps than the recipe has."""
    if trainer.recipe.steps < done:
        raise ValueError(f"{out} is at step {done} already, and --steps is {trainer.recipe.steps}")


def check_free(out: str | os.PathLike) -> None:
    """ValueError if a folder holds a run or a model, or cannot hold a new run."""
    out = Path(out)
    if os.path.exists(out / STATE):
        raise ValueError(
            f"{out} holds a run already; go on with --resume (resume=True), or choose another folder by --out"
        )
    if any(os.path.exists(out / name) for name in MODEL_FILES):
        raise ValueError(f"{out} holds a model, which training would replace; choose another folder by --out")
    check_writable(out / STATE)


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
    check_steps(trainer, out, step)
    if trainer.ranks.rank == 0:
        first_grid = min((step // sample_every + 1) * sample_every, trainer.recipe.steps)
        models = [folder / name for folder in average_folders(trainer, out).values() for name in MODEL_FILES]
        check_writable(state, out / "log.csv", *models, grid_path(out, first_grid))
        if not held.enter_context(locked(out / LOCK)):
            raise ValueError(
                f"{out} is in use: {holder(out / LOCK)} trains into it; wait, or choose another --out"
            )
    if resume:
        load_state(trainer, state, accept_changes)
    else:
        check_free(out)


def _loop(
    trainer: Trainer,
    out: Path,
    resume: bool,
    every: dict[str, int],
    measure: Measure | None,
    tensorboard: bool,
    progress: bool,
    limits: dict[str, Any],
) -> DDPM:
    bar = tqdm(
        total=trainer.recipe.steps,
        initial=trainer.step,
        unit=" steps",
        disable=not (progress and trainer.ranks.rank == 0),
    )
    with (
        bar,
        torch.random.fork_rng(),  # the steps seed PyTorch's global generators
        stop_signals() as signals,
        explain_lost_rank(trainer, out / STATE),
        shared_gradients(trainer),
    ):
        run = Run(trainer, out, every, signals, bar, resume, measure, tensorboard, **limits)
        if resume:
            run.catch_up()
        while trainer.step < trainer.recipe.steps:
            run.train_step()
            complete = run.log() if run.is_due("log") else True
            if run.is_due("save") or run.save_is_late():
                run.save()
            if run.is_due("sample"):
                complete &= run.sample()
            if run.is_due("measure"):
                complete &= run.measure_samples()
            if run.should_stop(complete):
                run.save_if_needed()
                raise Stopped(trainer.step)
            if run.is_out_of_time():
                run.save_if_needed()
                break
            run.fit_steps()
    return trainer.ema
