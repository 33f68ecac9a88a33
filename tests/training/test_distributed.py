"""Training by several ranks: the same run as by one, ranks that disagree, and ranks that die."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from diffusion.training.state import read_state
from diffusion.utils.ranks import Ranks
from helpers.ranks import TIMEOUT, finish, start
from helpers.training import DATA, PLAIN, make_trainer, run, state_of, torchvision_works

# Flips are drawn for the whole batch: each rank must take those of its own images.
FLIPPING = "replace(PLAIN, horizontal_flip=True)"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run of two ranks that nothing stopped."""
    return whole(tmp_path_factory.mktemp("two"), 2)


def whole(out, world_size, options=""):
    ended = finish(start(out, world_size, FLIPPING, options))
    assert [code for code, _ in ended] == [0] * world_size, ended
    assert not any("Warning" in text for _, text in ended), ended
    return out


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_ranks_train_what_one_would(world_size, two_ranks, tmp_path):
    """8 images are shared by 3 ranks as 2, 3 and 3."""
    run(tmp_path / "one", make_trainer(replace(PLAIN, horizontal_flip=True)))
    out = two_ranks if world_size == 2 else whole(tmp_path / "many", world_size, "micro_batch=2")
    one, many = state_of(tmp_path / "one"), state_of(out)
    assert one.keys() == many.keys()
    for name in one:
        torch.testing.assert_close(many[name], one[name], rtol=1e-3, atol=3e-5)
    lines = [(folder / "log.csv").read_text().splitlines() for folder in (tmp_path / "one", out)]
    assert len(lines[0]) == len(lines[1]) == 7
    for row, same in zip(*(line[1:] for line in lines), strict=True):
        assert float(same.split(",")[1]) == pytest.approx(float(row.split(",")[1]), rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        ("replace(PLAIN, seed=ranks.rank)", "", "rank 1 differs from rank 0 in its recipe"),
        pytest.param(
            *("PLAIN", "micro_batch=1 + ranks.rank", "rank 1 differs from rank 0 in its micro batch"),
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_ranks_that_disagree_all_stop(recipe, options, expected, tmp_path):
    for code, text in finish(start(tmp_path, recipe=recipe, options=options)):
        assert code == 2
        assert expected in text.splitlines()[-1]
    assert not (tmp_path / "state.safetensors").exists()


@pytest.mark.slow
def test_a_killed_rank_stops_the_others_and_the_run_resumes(two_ranks, tmp_path):
    out = tmp_path / "cut"
    dies = "ranks.rank == 1 and trainer.step == 3 and os.kill(os.getpid(), signal.SIGKILL)"
    (left, text), (killed, _) = finish(start(out, recipe=FLIPPING, before=dies, save_every=1))
    assert killed == -signal.SIGKILL
    assert left == 2
    assert "lost another rank" in text.splitlines()[-1]
    assert [code for code, _ in finish(start(out, recipe=FLIPPING, resume=True))] == [0, 0]
    expected, found = state_of(two_ranks), state_of(out)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("rank", "step"), [(1, 4), (0, 12)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(rank, step, tmp_path):
    """After the last step too, where only the first rank knows that its grid was not drawn."""
    told = f"ranks.rank == {rank} and trainer.step == {step - 1} and os.kill(os.getpid(), signal.SIGTERM)"
    ended = finish(start(tmp_path, before=told))
    assert all(f"stopped at step {step}" in text for _, text in ended), ended
    assert read_state(tmp_path / "state.safetensors")["step"] == step
    assert [code for code, _ in finish(start(tmp_path, resume=True))] == [0, 0]


def test_the_parts_of_all_ranks_are_the_batch():
    """Images, labels, timesteps and noise; the first steps hardly depend on the labels."""
    recipe = replace(PLAIN, horizontal_flip=True)
    ranks = [Ranks(rank=rank, world_size=3, local_rank=rank) for rank in range(3)]
    found = [make_trainer(recipe, ranks=each)._rank_batch() for each in ranks]
    for parts, whole in zip(zip(*found, strict=True), make_trainer(recipe)._rank_batch(), strict=True):
        assert torch.equal(torch.cat(parts), whole)


def test_a_step_of_several_ranks_shares_its_gradients():
    trainer = make_trainer(PLAIN, ranks=Ranks(rank=0, world_size=2, local_rank=0))
    with pytest.raises(RuntimeError, match=r"within distributed\.shared_gradients"):
        trainer.train_step()


def test_a_batch_smaller_than_the_ranks():
    with pytest.raises(ValueError, match="a batch of 8 cannot be shared by 9 ranks"):
        make_trainer(PLAIN, ranks=Ranks(rank=0, world_size=9, local_rank=0))


@pytest.mark.exhaustive  # the tests above set the variables that torchrun sets
@pytest.mark.skipif(not torchvision_works(), reason="the data set is read by torchvision")
def test_the_command_under_torchrun(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--local-addr=127.0.0.1"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command += ["-m", "diffusion", "train", "--data", "mnist", "--data-dir", str(DATA)]
    command += ["--steps", "2", "--batch-size", "4", "--out", str(tmp_path / "run"), "--set"]
    command += ["unet.channel_mult=[1]", "unet.attention_levels=[]"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("2 steps in") == 1  # the first rank speaks for all
    assert "2 ranks" in done.stdout
    assert (tmp_path / "run" / "model.safetensors").exists()
