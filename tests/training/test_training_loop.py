"""Training: what a step does, and runs that stop, fail or are killed and go on as if they had not."""

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
from diffusion.cli import main
from diffusion.data import load_mnist
from diffusion.training.recipe import load_recipe
from diffusion.training.state import load_state, read_state, save_state
from diffusion.training.trainer import Trainer
from helpers.processes import start_python
from helpers.training import (
    DATA,
    RECIPE,
    assert_same_run,
    make_trainer,
    run,
    run_until,
    state_of,
    torchvision_works,
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


@pytest.mark.thinned
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("samples", "ema-0.5") for kind in ("file", "pipe", "loop", "device")),
        *(
            (name, kind)
            for name in ("model.safetensors", "ema-0.5/config.json")
            for kind in ("folder", "pipe")
        ),
        ("samples/step-0000003.png", "folder"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_what_cannot_be_written_is_refused_before_a_step(name, kind, resume, tmp_path):
    recipe = replace(RECIPE, steps=6, more_ema_decays=(0.5,))
    if resume:
        save_state(make_trainer(recipe), tmp_path / "state.safetensors")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.touch()
    else:
        path.symlink_to(path.name if kind == "loop" else "/dev/zero")
    before = sorted(os.listdir(tmp_path))
    trainer = make_trainer(recipe)
    trainer.train_step = None
    with pytest.raises(ValueError, match=f"cannot write .*{name}") as caught:
        run(tmp_path, trainer, resume=resume, sample_every=3)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


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


def test_a_run_on_other_data_is_refused(unbroken):
    for name in ("images", "labels"):
        trainer = make_trainer()
        setattr(trainer, name, getattr(trainer, name).clone())
        getattr(trainer, name)[7] += 1
        with pytest.raises(ValueError, match="on other images or labels"):
            run(unbroken, trainer, resume=True)


def test_changes_are_accepted_where_they_are_asked_for(unbroken, tmp_path):
    """Fields that say how it is trained, not what; the loss's growth is then measured anew."""
    for path in unbroken.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    longer = replace(RECIPE, steps=14, learning_rate=1e-5)
    with pytest.raises(ValueError, match="it differs in steps, learning_rate"):
        run(tmp_path, make_trainer(longer), resume=True)
    averaged = make_trainer(replace(longer, ema_decay=0.5))
    with pytest.raises(ValueError, match="it differs in ema_decay"):
        run(tmp_path, averaged, resume=True, accept_changes=True)
    trainer = make_trainer(longer)
    trainer.images = trainer.images + 1
    run(tmp_path, trainer, resume=True, accept_changes=True)
    assert read_state(tmp_path / "state.safetensors")["step"] == 14
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [int(row["step"]) for row in rows][-2:] == [12, 14]
    assert float(rows[-1]["learning_rate"]) < 1e-5
    first_loss = read_state(tmp_path / "state.safetensors")["first_loss"]
    weighted = make_trainer(replace(longer, loss_weighting="p2", steps=16))
    run(tmp_path, weighted, resume=True, accept_changes=True)
    assert read_state(tmp_path / "state.safetensors")["first_loss"] != first_loss


def test_what_cannot_be_resumed(unbroken, tmp_path):
    with pytest.raises(ValueError, match="no run to resume"):
        run(tmp_path / "empty", resume=True)
    with pytest.raises(ValueError, match="holds a run already"):
        run(unbroken)
    with pytest.raises(ValueError, match="another recipe: it differs in batch_size, seed"):
        run(unbroken, make_trainer(replace(RECIPE, seed=1, batch_size=4)), resume=True)
    whole = (unbroken / "state.safetensors").read_bytes()
    for damage in (whole[:-1], whole[:100], b"", b"no tensors"):
        (tmp_path / "state.safetensors").write_bytes(damage)
        with pytest.raises(ValueError, match="damaged") as caught:
            run(tmp_path, resume=True)
        assert "\n" not in str(caught.value)
    tensors = state_of(unbroken)
    save_file({k: v for k, v in tensors.items() if "exp_avg" not in k}, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="no training state"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"label_dropout": -0.1}, "label_dropout"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_recipes_of_nonsense(change, expected):
    with pytest.raises(ValueError, match=expected):
        replace(RECIPE, **change)


def test_data_that_do_not_fit():
    images, labels = torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64)
    for bad_images, bad_labels, expected in (
        (images.float(), labels, r"uint8 in 0\.\.255, not float32"),
        (images.expand(20, 3, 8, 8), labels, r"\[N, 1, 8, 8\] for this recipe, not \[20, 3, 8, 8\]"),
        (images[:4], labels[:4], "one batch"),
        (images, None, "needs labels"),
        (images, labels[:5], "int64"),
        (images, labels + 3, r"from 3 to 3, but must be in 0\.\.2 for a model of 3 classes"),
        (images[..., :6], labels, r"must be \[N, 1, 8, 8\]"),
    ):
        with pytest.raises(ValueError, match=expected):
            Trainer(RECIPE, bad_images, bad_labels)


@pytest.mark.skipif(torchvision_works(), reason="torchvision can be imported here")
def test_without_torchvision_the_way_out_is_told(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--data-dir", str(DATA), "--out", "run"])
    assert caught.value.code == 2
    assert "fused-diffusion[train]" in capsys.readouterr().err


@pytest.mark.skipif(not torchvision_works(), reason="the data set is read by torchvision")
class TestMnist:
    def test_digits_are_read(self):
        images, labels = load_mnist(DATA, "train")
        assert images.shape == (256, 1, 28, 28)
        assert images.dtype == torch.uint8
        assert set(labels.tolist()) == set(range(10))

    def test_the_command_trains_and_resumes(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("diffusion.training.trainer.Trainer.validation_loss", lambda self, **options: 0.5)
        words = ["train", "--data", "mnist", "--data-dir", str(DATA), "--out", str(tmp_path / "run")]
        words += ["--steps", "4", "--batch-size", "4", "--save-every", "2"]
        monkeypatch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)
        main(words)
        output = capsys.readouterr()
        assert "4 steps in" in output.out
        assert "images/s" in output.err
        assert "loss" in output.err
        model = diffusion.load(tmp_path / "run")
        assert model.unet.config.to_dict().items() >= load_recipe("mnist").unet.items()
        with pytest.raises(SystemExit):
            main(words)
        assert "resume" in capsys.readouterr().err
        main([*words, "--resume"])  # has nothing left to do

    def test_a_recipes_data_are_those_of_its_name(self, tmp_path, capsys):
        for words, data in (([], "mnist"), (["--recipe", "cifar10-unconditional"], "cifar10")):
            with pytest.raises(SystemExit):
                main(["train", *words, "--data-dir", str(tmp_path), "--out", str(tmp_path / "run")])
            assert f"cannot read {data} in".lower() in capsys.readouterr().err.lower()

    def test_an_unconditional_model(self, tmp_path, monkeypatch):
        monkeypatch.setattr("diffusion.training.trainer.Trainer.validation_loss", lambda self, **options: 0.5)
        monkeypatch.setattr("diffusion.training.run.save_samples", lambda *arguments: True)
        out = tmp_path / "run"
        main(["train", "--data-dir", str(DATA), "--out", str(out), "--steps", "2", "--unconditional"])
        assert diffusion.load(out).num_classes is None

    @pytest.mark.parametrize("damage", ["truncated", "missing", "garbage"])
    def test_damaged_files_are_refused(self, damage, tmp_path):
        folder = tmp_path / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for path in (DATA / "MNIST" / "raw").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        victim = folder / "train-images-idx3-ubyte"
        if damage == "truncated":
            victim.write_bytes(victim.read_bytes()[:1000])
        elif damage == "garbage":
            victim.write_bytes(b"\x01" * 1000)
        else:
            victim.unlink()
        with pytest.raises(ValueError, match="cannot read MNIST") as caught:
            load_mnist(tmp_path, "train")
        assert "\n" not in str(caught.value)

    def test_unknown_split_and_missing_folder(self, tmp_path):
        with pytest.raises(ValueError, match="split"):
            load_mnist(DATA, "validation")
        with pytest.raises(ValueError, match="there is no"):
            load_mnist(tmp_path, "train")
