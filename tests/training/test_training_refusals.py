"""What a training run refuses: folders, data, changes and recipes."""

import csv
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from diffusion.training.state import read_state, save_state
from diffusion.training.trainer import Trainer
from helpers.training import (
    RECIPE,
    make_trainer,
    run,
    state_of,
)


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
