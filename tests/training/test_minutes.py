"""Runs that end within their minutes, by a clock of which every step takes a second."""

from dataclasses import replace

import pytest

from diffusion.cli import main
from diffusion.training import run as run_module
from diffusion.training.state import read_state
from helpers.ranks import finish, start
from helpers.training import RECIPE, assert_same_run, make_trainer, run, run_by, take_time


@pytest.fixture
def clock(monkeypatch):
    """clock(trainer, first=seconds) -> the trainer, whose first step takes longer."""
    now = [100.0]
    monkeypatch.setattr(run_module, "time", run_by(now))

    def timed(trainer, first=None):
        return take_time(trainer, now, first=first)

    timed.now = now
    return timed


def step_of(out):
    return read_state(out / "state.safetensors")["step"]


def test_a_run_ends_before_its_minutes_are_over_and_resumes(clock, unbroken, tmp_path):
    """After 3 of 8.5 seconds, another step and the 5 seconds of a first checkpoint would take too long."""
    trainer = clock(make_trainer())
    run(tmp_path, trainer, minutes=8.5 / 60)
    assert trainer.step == step_of(tmp_path) == 3
    run(tmp_path, make_trainer(), resume=True)
    assert_same_run(unbroken, tmp_path)


def test_compiling_in_the_first_step_does_not_end_the_run(clock, tmp_path):
    trainer = clock(make_trainer(), first=60)
    run(tmp_path, trainer, minutes=1.2, save_every=1000)  # of 12 s more, 6 are kept
    assert trainer.step == 8


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_all_ranks_end_after_the_same_step(slow, tmp_path):
    """One rank takes 3 s a step, so another step and a checkpoint end too late after 5; the other 1 s."""
    setup = f"clocked(trainer, 3 if ranks.rank == {slow} else 1)"
    setup += "; atexit.register(lambda: print('step', trainer.step, file=sys.stderr))"
    ended = finish(start(tmp_path, setup=setup, arguments="{'minutes': 20.5 / 60}"))
    assert [code for code, _ in ended] == [0, 0], ended
    assert [text.splitlines()[-1] for _, text in ended] == ["step 5", "step 5"]
    assert step_of(tmp_path) == 5
    assert [code for code, _ in finish(start(tmp_path, resume=True))] == [0, 0]
    assert step_of(tmp_path) == 12


def test_ranks_on_gpus_end_where_they_ask_each_other(clock, tmp_path, monkeypatch):
    """After 4 of 12.5 s, the 4 steps until they ask again and the first checkpoint would take 9 s."""
    monkeypatch.setattr(run_module.Run, "_asks_after_each_step", lambda run: False)
    trainer = clock(make_trainer())
    run(tmp_path, trainer, minutes=12.5 / 60, log_every=4, save_every=100)
    assert trainer.step == step_of(tmp_path) == 4


def test_one_step_is_always_taken(clock, tmp_path):
    run(tmp_path, clock(make_trainer()), minutes=0.001)
    assert step_of(tmp_path) == 1


def test_checkpoints_by_the_clock(clock, tmp_path, monkeypatch):
    saved, save = [], run_module.save_state
    monkeypatch.setattr(
        run_module, "save_state", lambda trainer, path: saved.append(trainer.step) or save(trainer, path)
    )
    run(tmp_path, clock(make_trainer()), save_every=7, save_minutes=3 / 60)
    assert saved == [3, 6, 7, 10, 12]


def test_a_grid_ends_with_the_minutes(clock, tmp_path, monkeypatch):
    """The last step is saved before its grid, which a resumed run draws."""

    def slow(model, path, stopping):
        clock.now[0] += 100
        return not stopping

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "save_samples", slow)
        run(tmp_path, clock(make_trainer()), minutes=1)
    assert step_of(tmp_path) == 12
    assert not list((tmp_path / "samples").glob("*"))
    run(tmp_path, make_trainer(), resume=True)
    assert list((tmp_path / "samples").glob("*"))


def test_the_steps_are_fitted_to_the_minutes(clock, tmp_path):
    """The learning rate falls over the steps that there will be, however many the recipe has."""
    trainer = clock(make_trainer(replace(RECIPE, steps=10**6)), first=41)
    run(tmp_path, trainer, minutes=1, save_every=1000)
    assert trainer.step == 15  # 41 s and 14 further steps; another one and 5 s would be 61 s
    fitted = clock(make_trainer(replace(RECIPE, steps=10**6)), first=11)
    run(tmp_path / "fitted", fitted, minutes=1, save_every=1000, fit_steps=True)
    # After half, of 60 s: 4 % are kept, and twice 5 s.
    assert fitted.step == fitted.recipe.steps == 30 - 11 + 1 + int(60 * 0.96 - 30 - 10)
    assert fitted.recipe.learning_rate_at(fitted.step - 1) < 0.1 * RECIPE.learning_rate
    assert read_state(tmp_path / "fitted" / "state.safetensors")["recipe"].steps == fitted.step


def test_wrong_arguments(tmp_path, capsys):
    with pytest.raises(ValueError, match="minutes must be"):
        run(tmp_path, minutes=0)
    with pytest.raises(ValueError, match="fit_steps needs minutes"):
        run(tmp_path, fit_steps=True)
    for words, expected in (
        (["--minutes", "-1"], "--minutes must be"),
        (["--fit-steps"], "--fit-steps needs --minutes"),
    ):
        with pytest.raises(SystemExit) as error:
            main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "run"), *words])
        assert error.value.code == 2
        assert expected in capsys.readouterr().err
