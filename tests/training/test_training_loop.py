"""The training loop: its steps, its files, and runs that go on where they stopped."""

import csv
import os
import signal
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import diffusion
from diffusion.training.state import load_state, read_state, save_state
from helpers.processes import start_python
from helpers.training import (
    RECIPE,
    assert_same_run,
    make_trainer,
    run,
    run_until,
    state_of,
)


def test_a_run_leaves_model_log_state_and_samples(unbroken):
    assert sorted(os.listdir(unbroken)) == [
        "config.json",
        "log.csv",
        "model.safetensors",
        "samples",
        "state.safetensors",
    ]
    assert os.listdir(unbroken / "samples") == ["step-0000012.png"]
    rows = list(csv.DictReader((unbroken / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [bool(row["validation_loss"]) for row in rows] == [False, True, False, True, False, True]
    ema = {k[5:]: v for k, v in state_of(unbroken).items() if k.startswith("ema0.")}
    model = diffusion.load(unbroken)
    assert all(torch.equal(ema[name], tensor) for name, tensor in model.unet.state_dict().items())
    assert model.metadata["training"]["step"] == 12
    assert model.prediction_type == RECIPE.prediction_type


def test_the_loss_falls():
    trainer = make_trainer(replace(RECIPE, steps=50, learning_rate=3e-3, unet=RECIPE.unet | {"dropout": 0.0}))
    before = trainer.validation_loss()
    for _ in range(50):
        trainer.train_step()
    assert trainer.validation_loss() < 0.6 * before


def test_a_run_that_fails_resumes_as_if_it_had_not(unbroken, tmp_path):
    run_until(8, tmp_path)
    run(tmp_path, resume=True)
    assert_same_run(unbroken, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resumes(number, unbroken, tmp_path):
    trainer = make_trainer()
    step = trainer.train_step

    def interrupted_in_step_8():
        if trainer.step == 8:
            os.kill(os.getpid(), number)
        return step()

    trainer.train_step = interrupted_in_step_8
    former = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, trainer)
    assert signal.getsignal(number) == former
    assert read_state(tmp_path / "state.safetensors")["step"] == 9  # the step it came in is finished
    run(tmp_path, resume=True)
    assert_same_run(unbroken, tmp_path)


SCRIPT = """
import sys, time
from pathlib import Path
from helpers.training import make_trainer, run
trainer = make_trainer()
step = trainer.train_step
def slow():
    time.sleep(0.05)
    return step()
trainer.train_step = slow
run(Path(sys.argv[1]), trainer, save_every=1)
"""


def test_a_killed_run_resumes_as_if_it_had_not_been(unbroken, tmp_path):
    # One thread in both processes: the order of sums depends on the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = start_python(SCRIPT, str(tmp_path), environment=environment)
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / "state.safetensors").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    run(tmp_path, resume=True)
    assert_same_run(unbroken, tmp_path)


@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_a_full_disk_keeps_the_last_state(kind, tmp_path, monkeypatch):
    run(tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    names = sorted(os.listdir(tmp_path))

    def fails(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise kind(*([28] if kind is OSError else []), "No space left on device")

    monkeypatch.setattr("diffusion.training.state.save_file", fails)
    with pytest.raises(ValueError, match="No space left"):
        save_state(make_trainer(), tmp_path / "state.safetensors")
    assert (tmp_path / "state.safetensors").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == names


def test_a_step_is_adam_with_clipping_warm_up_and_ema():
    recipe = replace(RECIPE, gradient_clip=1e-3, unet=RECIPE.unet | {"dropout": 0.0})
    trainer = make_trainer(recipe)
    reference = make_trainer(recipe)
    optimizer = torch.optim.Adam(reference.model.unet.parameters(), lr=1.0)
    for step in range(3):
        norm = trainer.train_step()
        # The same step from its parts; the gradient comes from the trainer, unclipped, by its norm.
        assert norm > 1e-3
        for ours, theirs in zip(
            trainer.model.unet.parameters(), reference.model.unet.parameters(), strict=True
        ):
            theirs.grad = ours.grad.clone()
        total = torch.stack([p.grad.square().sum() for p in reference.model.unet.parameters()]).sum().sqrt()
        torch.testing.assert_close(total.item(), 1e-3, rtol=1e-3, atol=0)
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * min((step + 1) / 4, (12 - step) / 9)
        optimizer.step()
        before = [p.clone() for p in reference.ema.unet.parameters()]
        decay = min(recipe.ema_decay, (1 + step) / (10 + step))
        for average, last, weight in zip(
            reference.ema.unet.parameters(), before, reference.model.unet.parameters(), strict=True
        ):
            average.copy_(decay * last + (1 - decay) * weight)
        for ours, theirs in ((trainer.model, reference.model), (trainer.ema, reference.ema)):
            for a, b in zip(ours.unet.parameters(), theirs.unet.parameters(), strict=True):
                torch.testing.assert_close(a, b)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    recipe = replace(RECIPE, learning_rate=1.0, steps=10, warmup_steps=4)
    rates = [recipe.learning_rate_at(step) for step in range(10)]
    assert rates[:4] == [0.2, 0.4, 0.6, 0.8]
    assert rates[4] == 1.0
    assert rates[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_every_image_is_seen_once_an_epoch():
    trainer = make_trainer()
    seen = [trainer.batch_indices(step).tolist() for step in range(10)]
    first, second = [*chain(*seen[:5])], [*chain(*seen[5:])]
    assert len(set(first)) == len(first) == 40  # the four that fill no batch are others in every epoch
    assert len(set(second)) == 40
    assert first != second


def test_every_step_draws_its_own_timesteps_and_noise():
    trainer, drawn = make_trainer(), []
    for trainer.step in (0, 1, 1):
        _, _, t, noise = trainer._rank_batch()
        drawn.append((t, noise))
    for first, second, again in zip(*drawn, strict=True):
        assert torch.equal(second, again)
        assert not torch.equal(first, second)


def test_unconditional_and_autocast(tmp_path):
    recipe = replace(RECIPE, unet=RECIPE.unet | {"num_classes": None}, steps=3)
    model = run(tmp_path, make_trainer(recipe, autocast=torch.bfloat16))
    assert model.num_classes is None
    assert model.sample(steps=2).isfinite().all()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(replace(RECIPE, steps=50))
    step = trainer.train_step

    def explodes_in_step_7():
        norm = step()
        if trainer.step > 7:
            trainer.log_line.losses[-1] *= float("nan")
        return norm

    trainer.train_step = explodes_in_step_7
    with pytest.raises(
        ValueError, match=r"loss is nan at step 8; .* holds step 5, the last good.*learning rate"
    ):
        run(tmp_path, trainer)
    assert read_state(tmp_path / "state.safetensors")["step"] == 5


def test_a_state_of_which_a_bit_has_flipped(unbroken, tmp_path):
    """The bit is in a weight, an average, a moment or the metadata; older states hold no digest."""
    with safe_open(unbroken / "state.safetensors", framework="pt") as file:
        about, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path, longer = tmp_path / "state.safetensors", replace(RECIPE, steps=RECIPE.steps + 1)
    for name in ("model.input_conv.weight", "ema0.input_conv.weight", "adam.exp_avg.input_conv.weight"):
        flipped = tensors[name].clone()
        flipped.view(torch.int32).flatten()[0] ^= 1
        save_file(tensors | {name: flipped}, path, about)
        with pytest.raises(ValueError, match=r"state\.safetensors is damaged: .*SHA-256"):
            load_state(make_trainer(longer), path, accept_changes=True)
    later = about["training"].replace('"step": 12', '"step": 11')
    assert later != about["training"]
    save_file(tensors, path, about | {"training": later})
    with pytest.raises(ValueError, match="SHA-256"):
        load_state(make_trainer(longer), path, accept_changes=True)
    save_file(tensors, path, {"training": about["training"]})
    trainer = make_trainer(longer)
    load_state(trainer, path, accept_changes=True)
    assert trainer.step == 12


def test_models_that_a_kill_left_behind_their_state_are_made_again(unbroken, tmp_path, monkeypatch):
    """The state of the last step is there, and the disk was full before the models of it were."""

    def full(*args, **options):
        raise ValueError("No space left on device")

    recipe = replace(RECIPE, more_ema_decays=(0.5,))
    with monkeypatch.context() as patch:
        patch.setattr("diffusion.ddpm.DDPM.save", full)
        with pytest.raises(ValueError, match="No space left"):
            run(tmp_path, make_trainer(recipe), save_every=12)
    assert read_state(tmp_path / "state.safetensors")["step"] == 12
    run(tmp_path, make_trainer(recipe), resume=True)
    for folder, decay in ((tmp_path, 0.9), (tmp_path / "ema-0.5", 0.5)):
        about = diffusion.load(folder).metadata["training"]
        assert (about["step"], about["ema_decay"]) == (12, decay)
    models = [load_file(folder / "model.safetensors") for folder in (unbroken, tmp_path)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_a_model_in_the_folder_is_not_replaced(unbroken, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((unbroken / name).read_bytes())
    with pytest.raises(ValueError, match="holds a model, which training would replace"):
        run(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_a_log_on_a_full_disk(tmp_path, monkeypatch):
    """A line that was cut off is dropped, whatever it looks like, and the others are never lost."""
    run(tmp_path, make_trainer(replace(RECIPE, steps=4)))
    log = tmp_path / "log.csv"
    whole = log.read_text()
    for cut in ("1", "3,0.5,,0.1,0.2,9"):
        log.write_text(whole + cut)
        run(tmp_path, make_trainer(replace(RECIPE, steps=4)), resume=True)
        assert log.read_text() == whole

    def full(self, *args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(ValueError, match=r"cannot write .*log\.csv: No space left"):
            run(tmp_path, make_trainer(replace(RECIPE, steps=4)), resume=True)
    assert log.read_text() == whole
    patched = make_trainer(replace(RECIPE, steps=4))
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ValueError, match=r"cannot write .*log\.csv: No space left"):
        run(tmp_path / "new", patched)


@pytest.mark.filterwarnings("ignore:.*lacks lines")
@pytest.mark.parametrize("name", ["samples", "log.csv"])
def test_the_state_is_saved_before_a_failure_to_write(name, unbroken, tmp_path):
    """The grids' folder, or the log, is taken away in step 4; the run goes on from there to the same end."""
    trainer = make_trainer()
    step, path = trainer.train_step, tmp_path / name

    def takes_it_away():
        if trainer.step == 3:
            path.unlink() if path.is_file() else None
            path.touch() if name == "samples" else path.mkdir()
        return step()

    trainer.train_step = takes_it_away
    with pytest.raises(ValueError, match=f"cannot write .*{name}"):
        run(tmp_path, trainer, sample_every=4, save_every=100)
    assert read_state(tmp_path / "state.safetensors")["step"] == 4
    path.unlink() if path.is_file() else path.rmdir()
    run(tmp_path, resume=True, sample_every=4)
    models = [load_file(folder / "model.safetensors") for folder in (unbroken, tmp_path)]
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])
    grids = [f"step-{step:07d}.png" for step in (4, 8, 12)]
    assert sorted(os.listdir(tmp_path / "samples")) == grids
