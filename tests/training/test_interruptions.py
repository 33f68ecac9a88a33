"""Training runs that are killed, stopped or joined by another process, at the worst moments."""

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion.ddpm import DDPM
from diffusion.models.config import UNetConfig
from diffusion.storage.locks import locked
from diffusion.training.log_file import LogFile
from diffusion.training.state import load_state, read_state, save_state
from helpers.processes import start_python
from helpers.ranks import finish
from helpers.ranks import start as start_ranks
from helpers.thinning import exhaustive_but
from helpers.training import RECIPE, assert_same_run, make_trainer, run, state_of

# One process imports the package once and forks a run for each moment; the child kills itself at that moment.
SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from helpers.training import make_trainer, run
import diffusion.training.log_file, diffusion.training.loop, diffusion.training.state
import diffusion.storage.atomic, diffusion.storage.checkpoint, diffusion.storage.images
torch.set_num_threads(1)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(owner, name, count, before=lambda *a, **k: None):
    original, calls = getattr(owner, name), []
    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == count:
            before(*arguments, **options)
            die()
        return original(*arguments, **options)
    setattr(owner, name, dies)

def at_rename(name, count):
    original, calls = diffusion.storage.atomic.os.replace, []
    def dies(source, target):
        calls.append(Path(target).name)
        if calls.count(name) == count:
            die()
        return original(source, target)
    diffusion.storage.atomic.os.replace = dies

def half(tensors, path, **options):
    Path(path).write_bytes(b"half")

def half_a_line(log, *values):
    with log.path.open("a") as file:
        file.write("8,0.")

MOMENTS = {
    "in the second state": lambda: at_call(diffusion.training.state, "save_file", 2, half),
    "before the second state's rename": lambda: at_rename("state.safetensors", 2),
    "before the second model": lambda: at_call(diffusion.storage.checkpoint, "save_file", 2, half),
    "before the second weights' rename": lambda: at_rename("model.safetensors", 2),
    "before the second configuration's rename": lambda: at_rename("config.json", 2),
    "in a line of the log": lambda: at_call(diffusion.training.log_file.LogFile, "add", 4, half_a_line),
    "in the validation": lambda: at_call(diffusion.training.trainer.Trainer, "validation_loss", 2),
    "in a grid's sampling": lambda: at_call(diffusion.DDPM, "sample", 1),
    "before a grid's rename": lambda: at_rename("step-0000006.png", 1),
    "in a step": lambda: at_call(torch.optim.Adam, "step", 8),
}
for line in sys.stdin:
    out, moment = json.loads(line)
    child = os.fork()
    if not child:
        MOMENTS[moment]()
        run(Path(out), make_trainer(), sample_every=6)
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""
MOMENTS = (
    "in the second state",
    "before the second state's rename",
    "before the second model",
    "before the second weights' rename",
    "before the second configuration's rename",
    "in a line of the log",
    "in the validation",
    "in a grid's sampling",
    "before a grid's rename",
    "in a step",
)


@pytest.fixture(scope="module")
def killed():
    """Runs into a folder until the moment, and gives how the process ended."""
    process = start_python(SCRIPT, environment=os.environ | {"OMP_NUM_THREADS": "1"})

    def kill(out: Path, moment: str) -> int:
        print(json.dumps([str(out), moment]), file=process.stdin, flush=True)
        return os.waitstatus_to_exitcode(int(process.stdout.readline()))

    yield kill
    process.stdin.close()
    process.wait(timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("moment", exhaustive_but(MOMENTS, default=MOMENTS[::4]))
def test_a_run_resumes_as_if_it_had_not_been_killed(moment, killed, unbroken, tmp_path):
    assert killed(tmp_path, moment) == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()  # the kernel has unlocked it
    run(tmp_path, resume=True, sample_every=6)
    assert_same_run(unbroken, tmp_path)
    names = {"config.json", "log.csv", "model.safetensors", "samples", "state.safetensors"}
    assert set(os.listdir(tmp_path)) == names
    assert sorted(os.listdir(tmp_path / "samples")) == ["step-0000006.png", "step-0000012.png"]


# --- signals


@pytest.mark.thinned
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("sample_every", [7, 100])
def test_a_grid_stops_at_the_next_step(number, sample_every, unbroken, tmp_path, monkeypatch):
    """The run is saved, and the one that resumes it draws the grid: of step 7, or of the last step."""
    sample, seen = DDPM.sample, []

    def told(self, *arguments, callback, **options):
        def watched(i, x, x0):
            seen.append(i)
            if i == 3:
                os.kill(os.getpid(), number)
            callback(i, x, x0)

        return sample(self, *arguments, callback=watched, **options)

    with monkeypatch.context() as patch:
        patch.setattr(DDPM, "sample", told)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, sample_every=sample_every)
    assert seen == [0, 1, 2, 3]
    step = min(sample_every, 12)
    assert read_state(tmp_path / "state.safetensors")["step"] == step
    assert not (tmp_path / "samples").exists()
    run(tmp_path, resume=True, sample_every=sample_every)
    assert_same_run(unbroken, tmp_path)
    assert f"step-{step:07d}.png" in os.listdir(tmp_path / "samples")


def test_a_signal_before_a_grid_draws_none(unbroken, tmp_path, monkeypatch):
    trainer = make_trainer()
    step = trainer.train_step

    def interrupted_in_step_6():
        if trainer.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    trainer.train_step = interrupted_in_step_6
    with monkeypatch.context() as patch:
        patch.setattr(DDPM, "sample", None)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, trainer, sample_every=6)
    run(tmp_path, resume=True, sample_every=6)
    assert_same_run(unbroken, tmp_path)
    assert sorted(os.listdir(tmp_path / "samples")) == ["step-0000006.png", "step-0000012.png"]


def test_a_second_signal_ends_a_grid_at_once(tmp_path, monkeypatch):
    def told_twice(self, *arguments, **options):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the second signal did not end it")

    monkeypatch.setattr(DDPM, "sample", told_twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, sample_every=6)
    assert read_state(tmp_path / "state.safetensors")["step"] == 5  # the last that was saved on time


@pytest.mark.parametrize("step", [4, 12])
def test_a_validation_stops_at_the_next_batch(step, unbroken, tmp_path):
    """The line of the log that it cuts off is written by the run that resumes this one."""
    trainer = make_trainer()
    loss, calls = trainer.ema.loss, []

    def told(*arguments, **options):
        calls.append(trainer.step)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(*arguments, **options)

    trainer.ema.loss = told
    validation = trainer.validation_loss
    trainer.validation_loss = lambda **options: validation(3 if trainer.step == step else 256, **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, trainer)
    assert calls.count(step) == 1  # one of four batches
    assert read_state(tmp_path / "state.safetensors")["step"] == step
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert int(rows[-1]["step"]) == step - 2
    run(tmp_path, resume=True)
    assert_same_run(unbroken, tmp_path)


# --- two processes in one folder


def test_a_folder_that_is_trained_into_is_refused(unbroken, tmp_path):
    log = (unbroken / "log.csv").read_bytes()
    for out, resume in ((unbroken, True), (tmp_path / "new", False)):
        with locked(out / ".lock"), pytest.raises(ValueError, match="is in use: process") as caught:
            run(out, resume=resume)
        assert str(out) in str(caught.value)
        assert str(os.getpid()) in str(caught.value)
    assert (unbroken / "log.csv").read_bytes() == log
    assert os.listdir(tmp_path / "new") == []
    run(tmp_path / "new", make_trainer(replace(RECIPE, steps=1)))


def test_a_run_holds_its_folder_to_its_end(tmp_path):
    trainer = make_trainer(replace(RECIPE, steps=3))
    step, refused = trainer.train_step, []

    def joined():
        with pytest.raises(ValueError, match="is in use"):
            run(tmp_path)
        refused.append(trainer.step)
        return step()

    trainer.train_step = joined
    run(tmp_path, trainer)
    assert refused == [0, 1, 2]
    assert ".lock" not in os.listdir(tmp_path)


@pytest.mark.exhaustive
def test_all_ranks_end_where_the_first_is_refused(tmp_path):
    with locked(tmp_path / ".lock"):
        for code, text in finish(start_ranks(tmp_path)):
            assert code == 2
            assert "is in use: process" in text.splitlines()[-1]
    assert os.listdir(tmp_path) == []


# --- states and logs that say nonsense


def rewrite(out, source, without=(), **changes):
    with safe_open(source / "state.safetensors", "pt") as file:
        about = json.loads(file.metadata()["training"]) | changes
    about = {name: value for name, value in about.items() if name not in without}
    save_file(state_of(source), out / "state.safetensors", metadata={"training": json.dumps(about)})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("step", -5, "step must be"),
        ("step", 13, r"0\.\.12"),
        ("step", 10**30, "step must be"),
        ("step", 10**400, "step must be"),
        ("step", float("inf"), "step must be"),
        ("step", 3.5, "step must be"),
        ("step", True, "step must be"),
        ("step", "7", "step must be"),
        ("seconds", float("nan"), "seconds must be"),
        ("seconds", float("inf"), "seconds must be"),
        ("seconds", -1.0, "seconds must be"),
        ("seconds", 10**400, "seconds must be"),
        ("losses", [0.5] * 2, "2 losses and 0 norms"),
        ("losses", 3, "damaged"),
        ("norms", [float("inf")] * 2, "2 norms"),
        ("first_loss", float("inf"), "first_loss must be"),
        ("first_loss", "much", "first_loss must be"),
        ("recipe", {"steps": 12, "colour": "red"}, "colour"),
        ("recipe", {"steps": 10**400}, "steps"),
        ("recipe", [], "batch_size"),
        ("scaler", 4, "damaged"),
        ("images", -1, "images must be"),
        ("images_before", 10**30, "images_before must be"),
    ],
)
def test_states_of_nonsense(name, value, expected, unbroken, tmp_path):
    rewrite(tmp_path, unbroken, **{name: value})
    with pytest.raises(ValueError, match=expected) as caught:
        run(tmp_path, resume=True)
    assert "state.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["state.safetensors"]


def test_fewer_steps_than_were_taken(unbroken, tmp_path):
    rewrite(tmp_path, unbroken)
    with pytest.raises(ValueError, match=r"is at step 12 already, and --steps is 5"):
        run(tmp_path, make_trainer(replace(RECIPE, steps=5)), resume=True, accept_changes=True)


@pytest.mark.parametrize(
    ("losses", "norms", "expected"),
    [([0.5, float("nan")], [0.1, 0.1], "losses must be"), ([0.5, 0.5], [0.1, float("inf")], "norms must be")],
)
def test_steps_of_nonsense(losses, norms, expected, unbroken, tmp_path):
    rewrite(tmp_path, unbroken, losses=losses, norms=norms)
    with pytest.raises(ValueError, match=rf"state\.safetensors is no training state.*{expected}"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("name", "value"), [("exp_avg", float("nan")), ("exp_avg_sq", -1.0), ("step", float("nan"))]
)
def test_an_optimizer_of_nonsense(name, value, unbroken, tmp_path):
    rewrite(tmp_path, unbroken)
    path = tmp_path / "state.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[f"adam.{name}.input_conv.bias"] = torch.full_like(tensors[f"adam.{name}.input_conv.bias"], value)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged: .*input_conv\.bias"):
        run(tmp_path, resume=True)


def test_an_older_state_lacks_what_has_a_default(unbroken, tmp_path):
    """Fields that a recipe or a UNet got since, at the values they have where they are not given."""
    recipe = read_state(unbroken / "state.safetensors")["recipe"]
    fields = ("unet", "steps", "batch_size", "warmup_steps", "ema_decay")
    older = {name: getattr(recipe, name) for name in fields}
    assert len(older) < len(vars(recipe))
    rewrite(tmp_path, unbroken, without=("images", "images_before"), recipe=older)
    trainer = make_trainer(replace(RECIPE, unet=RECIPE.unet | {"norm_eps": UNetConfig().norm_eps}))
    load_state(trainer, tmp_path / "state.safetensors")
    assert trainer.step == 12
    assert trainer.images_seen == (12 * 8, 0)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bytes(range(256)), "no text in UTF-8"),
        (b"\0" * 100, "no log"),
        (b"my own notes\n", "no log"),
        (b"", "no log"),
        (b"{header}2,0.5\n4,0.5,,1e-3,0.1,3\n", "damaged in line 2"),
        (b"{header}x,0.5,,1e-3,0.1,3\n", "damaged in line 2"),
        (b"{header}0,0.5,,1e-3,0.1,3\n", "damaged in line 2: step 0 does not come after 0"),
        (b"{header}2,1,,1,1,1\n4,1,,1,1,1\n3,1,,1,1,1\n", "damaged in line 4: step 3 does not come after 4"),
        (b"{header}2,1,,1,1,1\n2,1,,1,1,1\n4,1,,1,1,1\n", "damaged in line 3: step 2 does not come after 2"),
        (b"{header}14,1,,1,1,1\n13,1,,1,1,1\n", "damaged in line 3: step 13 does not come after 14"),
        (b"{header}" + b"9" * 5000 + b",0.5,,1e-3,0.1,3\n", "damaged in line 2"),
    ],
)
def test_logs_of_nonsense(content, expected, unbroken, tmp_path):
    rewrite(tmp_path, unbroken)
    header = (unbroken / "log.csv").read_bytes().splitlines(keepends=True)[0]
    content = content.replace(b"{header}", header)
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"log\.csv is {expected}") as caught:
        run(tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "log.csv").read_bytes() == content


def steps_of(out) -> list[int]:
    return [int(row["step"]) for row in csv.DictReader((out / "log.csv").open())]


def test_a_log_that_was_cut_short_is_continued_and_it_is_told(unbroken, tmp_path):
    trainer = make_trainer(replace(RECIPE, steps=6))
    run(tmp_path, trainer)
    lines = (tmp_path / "log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "log.csv").write_text("".join(lines[:2]) + "4,0.")
    longer = make_trainer(replace(RECIPE, steps=8))
    with pytest.warns(
        UserWarning, match=r"log\.csv lacks lines: it ends at step 2, and the run's last was 6"
    ):
        run(tmp_path, longer, resume=True, accept_changes=True)
    assert steps_of(tmp_path) == [2, 8]


def test_notes_in_the_place_of_a_log_are_kept_before_its_first_line(tmp_path):
    trainer = make_trainer(replace(RECIPE, steps=4))
    for _ in range(3):
        trainer.train_step()
    save_state(trainer, tmp_path / "state.safetensors")
    (tmp_path / "log.csv").write_text("my own notes\n")
    with pytest.raises(ValueError, match=r"log\.csv is no log"):
        run(tmp_path, make_trainer(replace(RECIPE, steps=4)), resume=True)
    assert (tmp_path / "log.csv").read_text() == "my own notes\n"


def test_a_line_that_a_killed_run_added_is_not_there_twice(unbroken, tmp_path):
    """The state, of step 6, was saved before the line of it; the resumed run was killed after that line."""
    trainer = make_trainer()
    for step in range(1, 7):
        trainer.train_step()
        if step in (2, 4):
            trainer.log_line.finish()
    save_state(trainer, tmp_path / "state.safetensors")
    (tmp_path / "log.csv").write_bytes(b"".join((unbroken / "log.csv").read_bytes().splitlines(True)[:4]))
    run(tmp_path, resume=True)
    assert steps_of(tmp_path) == [2, 4, 6, 8, 10, 12]
    assert_same_run(unbroken, tmp_path)


def test_steps_beyond_a_million_are_whole_numbers(tmp_path):
    log = LogFile(tmp_path / "log.csv", None)
    for step in (999_999, 1_000_000, 1_234_567, 1_234_568):
        log.add(step, 0.5, None, 1e-3, 0.1, 3.0)
    LogFile(tmp_path / "log.csv", 1_234_567)
    assert steps_of(tmp_path) == [999_999, 1_000_000, 1_234_567]
