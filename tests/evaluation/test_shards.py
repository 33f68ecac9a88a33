"""Folders of shards: the same bytes from any number of ranks, and the settings that they keep."""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch

from diffusion import DDPM, NoiseSchedule
from diffusion.cli import main
from diffusion.evaluation.shards import report, sample_shards
from diffusion.storage.images import to_uint8
from diffusion.utils.ranks import Ranks
from helpers.models import make_model
from helpers.processes import start_python
from helpers.shards import model_of, shards_of

OPTIONS = ["--steps", "4", "--sampler", "ddim", "--shard-size", "3", "--num", "11", "--seed", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of ten classes."""
    path = tmp_path_factory.mktemp("model")
    make_model(10).save(path)
    return path


def start(model, out, rank=0, world_size=1, threads=1, options=OPTIONS, asks=False):
    command = "import sys; from diffusion.cli import main; "
    if asks:  # says when it begins a shard, and waits for a line before it does
        command += "import diffusion; sample = diffusion.DDPM.sample; "
        command += "ask = lambda: print('begun', flush=True) or sys.stdin.readline(); "
        command += "diffusion.DDPM.sample = lambda *a, **k: (ask(), sample(*a, **k))[1]; "
    command += "main(sys.argv[1:])"
    words = ["sample", "--model", str(model), "--out", f"{out}/", *options]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    return start_python(command, *words, environment=environment)


def begun(process) -> None:
    """Waits until the process begins a shard."""
    assert process.stdout.readline() == "begun\n", process.communicate()[1]


def finish(*processes) -> list[tuple[int, str, str]]:
    """Waits for each rank; gives its exit status, stdout and stderr."""
    try:
        for process in processes:
            process.stdin.close()
            process.stdin = None
        return [(p.returncode, *output) for p in processes if (output := p.communicate(timeout=300))]
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def whole_folder(folder, tmp_path_factory):
    """A run of one rank with one thread: this process has one."""
    out = tmp_path_factory.mktemp("whole") / "out"
    main(["sample", "--model", str(folder), "--out", f"{out}/", *OPTIONS])
    return out


@pytest.fixture(scope="module")
def whole(whole_folder):
    """The shards of that run."""
    return shards_of(whole_folder)


def test_shards_hold_the_images_of_their_ids(whole, folder, tmp_path):
    import diffusion

    assert list(whole) == [f"shard-{k:05d}.npz" for k in range(4)]
    model = diffusion.load(folder)
    expected = model.sample(
        labels=[i % 10 for i in range(11)], guidance_scale=2.0, sampler="ddim", steps=4, seed=5
    )
    for k, data in enumerate(whole.values()):
        (tmp_path / "shard.npz").write_bytes(data)
        with np.load(tmp_path / "shard.npz", allow_pickle=False) as shard:
            ids = range(3 * k, min(11, 3 * k + 3))
            assert shard["sample_ids"].tolist() == list(ids)
            assert shard["labels"].tolist() == [i % 10 for i in ids]
            pixels = to_uint8(expected[3 * k : 3 * k + 3]).permute(0, 2, 3, 1)
            assert np.abs(shard["images"].astype(int) - pixels.numpy()).max() <= 1
            assert shard["images"].std() > 10


@pytest.mark.parametrize(
    ("world_size", "threads"),
    [(2, 3), *(pytest.param(*counts, marks=pytest.mark.exhaustive) for counts in ((1, 2), (2, 1), (4, 1)))],
)
def test_any_ranks_and_threads_make_the_same_bytes(world_size, threads, whole, folder, tmp_path):
    out = tmp_path / "out"
    processes = [start(folder, out, rank, world_size, threads, asks=True) for rank in range(world_size)]
    for process in processes:  # each holds one of its own shards, so that all take part
        begun(process)
    ended = finish(*processes)
    assert [code for code, _, _ in ended] == [0] * world_size, ended
    assert shards_of(out) == whole
    lines = [line for _, text, _ in ended for line in text.splitlines()]
    made = [int(line.split(": ")[1].split()[0]) for line in lines if line.startswith("rank ")]
    assert len(made) == world_size
    assert sum(made) == 11
    (total,) = (line for line in lines if "efficiency" in line)  # the last to end tells of all
    assert total.startswith(f"{world_size} ranks: 11 images in ")


def test_one_of_ranks_that_end_together_tells_of_all(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    done = {"images": 3, "seconds": 1.0, "kept": 0, "remade": [], "started": time.time()}
    for _ in range(20):
        together = Barrier(8)

        def end(rank, together=together):
            together.wait()
            return report(tmp_path, done, Ranks(rank, 8))

        with ThreadPoolExecutor(8) as pool:
            reports = list(pool.map(end, range(8)))
        assert sum(len(lines) - 1 for lines in reports) == 1
        for path in tmp_path.glob(".rank-*.json"):
            path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("now", [1, 3])
def test_a_killed_rank_is_replaced(now, whole, folder, tmp_path):
    out = tmp_path / "out"
    dying = start(folder, out, 0, 2, asks=True)
    begun(dying)
    print(file=dying.stdin, flush=True)
    begun(dying)  # the second: one shard is there
    dying.send_signal(signal.SIGKILL)
    finish(dying)
    assert len(shards_of(out)) == 1
    ended = finish(*(start(folder, out, rank, now) for rank in range(now)))
    assert [code for code, _, _ in ended] == [0] * now, ended
    assert shards_of(out) == whole


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is rank 1 of 2."""
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)


def test_a_living_rank_takes_over(whole, folder, tmp_path, second_of_two, capsys):
    """The other ranks make the shards of a rank that never starts."""
    main(["sample", "--model", str(folder), "--out", f"{tmp_path}/out/", *OPTIONS])
    assert "rank 1 of 2: 11 images" in capsys.readouterr().out
    assert shards_of(tmp_path / "out") == whole


def test_what_is_there_is_kept_and_what_is_damaged_made_again(whole, folder, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["sample", "--model", str(folder), "--out", f"{out}/", *OPTIONS]
    main(words)
    capsys.readouterr()
    times = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*")}
    (out / "shard-00001.npz").write_bytes(whole["shard-00001.npz"][:-30])
    (out / "shard-00002.npz").write_bytes(whole["shard-00000.npz"])  # a shard of other ids
    middle = bytearray(whole["shard-00003.npz"])
    middle[60] ^= 0xFF
    (out / "shard-00003.npz").write_bytes(bytes(middle))
    main(words)
    output = capsys.readouterr().out
    assert "8 images" in output
    (line,) = (line for line in output.splitlines() if line.startswith("made again: "))
    assert [f"shard-0000{k}.npz" in line for k in range(4)] == [False, True, True, True]
    assert shards_of(out) == whole
    assert (out / "shard-00000.npz").stat().st_mtime_ns == times["shard-00000.npz"]
    assert not [path for path in os.listdir(out) if path.endswith(".lock")]


def test_numbers_of_numpy_and_torch_are_those_of_python(tmp_path):
    model = make_model(10)
    sample_shards(model, tmp_path, np.int64(2), np.array([3, 1]), steps=np.int64(2), guidance_scale=2.0)
    labels = torch.tensor([3, 1])
    done = sample_shards(model, tmp_path, 2, labels, steps=2, guidance_scale=np.float64(2))
    assert (done["images"], done["kept"]) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--seed", "6"], "another seed (5, not 6)"),
        (["--steps", "5"], "another steps (4, not 5)"),
        (["--guidance-scale", "3"], "another guidance_scale (2.0, not 3.0)"),
        (["--labels", "3"], "another labels"),
        (["--num", "12"], "another num (11, not 12)"),
        (["--eta", "0.5"], "another eta (None, not 0.5)"),
        (["--precision", "fast"], "another precision"),
    ],
)
def test_a_folder_of_other_settings_is_refused(changes, expected, whole_folder, folder, tmp_path, capsys):
    shutil.copytree(whole_folder, tmp_path / "out")
    words = ["sample", "--model", str(folder), "--out", str(tmp_path / "out"), *OPTIONS]
    before = shards_of(tmp_path / "out")
    with pytest.raises(SystemExit) as caught:
        main([*words, *changes])
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
    assert shards_of(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("option", "expected"),
    [("eta", "(0.5, not None)"), ("spacing", "(leading, not None)"), ("precision", "")],
)
def test_an_option_that_is_left_out_is_another_setting(option, expected, folder, tmp_path, capsys):
    words = ["sample", "--model", str(folder), "--out", f"{tmp_path}/out/", *OPTIONS]
    values = {"eta": "0.5", "spacing": "leading", "precision": "fast"}
    main([*words, f"--{option}", values[option]])
    before = shards_of(tmp_path / "out")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"holds images of another {option} {expected}" in told
    assert shards_of(tmp_path / "out") == before


def test_none_is_another_setting_than_nothing(tmp_path):
    """`clip=None` samples without a limit, and the model's own limit is another one."""
    sample_shards(model_of(), tmp_path, 2, steps=2, clip=None)
    with pytest.raises(ValueError, match="holds images of another clip; choose another folder"):
        sample_shards(model_of(), tmp_path, 2, steps=2)


def test_a_whole_number_is_an_equal_float(tmp_path):
    sample_shards(model_of(10), tmp_path, 2, [1], steps=2, guidance_scale=2)
    assert sample_shards(model_of(10), tmp_path, 2, [1], steps=2, guidance_scale=2.0)["kept"] == 1


def test_another_model_is_refused(folder, tmp_path):
    sample_shards(model_of(10), tmp_path, 2, [1], steps=2)
    with pytest.raises(ValueError, match="images of another model"):
        sample_shards(model_of(10, seed=1), tmp_path, 2, [1], steps=2)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        sample_shards(model_of(10), tmp_path, 2, [1], steps=2)


@pytest.mark.parametrize("other", [{"guidance_rescale": 0.5}, {"guidance_parallel": 0.5}])
def test_a_model_with_other_guidance_of_its_own_is_refused(other, tmp_path):
    unet, schedule = make_model(10).unet, NoiseSchedule.linear()
    sample_shards(DDPM(unet, schedule), tmp_path, 2, [1], steps=2)
    with pytest.raises(ValueError, match="images of another model"):
        sample_shards(DDPM(unet, schedule, **other), tmp_path, 2, [1], steps=2)


def test_ranks_that_disagree_are_refused(folder, tmp_path, second_of_two, capsys):
    first = start(folder, tmp_path / "out", 0, 2, asks=True)
    begun(first)
    with pytest.raises(SystemExit) as caught:
        main(["sample", "--model", str(folder), "--out", f"{tmp_path}/out/", *OPTIONS, "--seed", "6"])
    finish(first)
    assert caught.value.code == 2
    assert "another seed (5, not 6)" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_full_disk_leaves_finished_shards(folder, tmp_path, monkeypatch):
    import diffusion.storage.images

    write, calls = np.savez_compressed, []

    def fails(file, **arrays):
        calls.append(arrays)
        if len(calls) == 3:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        write(file, **arrays)

    monkeypatch.setattr(diffusion.storage.images.np, "savez_compressed", fails)
    with pytest.raises(ValueError, match="No space left"):
        sample_shards(model_of(), tmp_path, 9, shard_size=2, steps=2)
    assert sorted(os.listdir(tmp_path))[-2:] == ["shard-00000.npz", "shard-00001.npz"]
    monkeypatch.undo()
    assert sample_shards(model_of(), tmp_path, 9, shard_size=2, steps=2)["images"] == 5


def test_batches_do_not_matter(tmp_path):
    for name, size in (("a", 1), ("b", 4)):
        sample_shards(model_of(), tmp_path / name, 7, shard_size=5, steps=2, batch_size=size)
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")


def test_nonsense(tmp_path, capsys, folder):
    for shard_size in (0, True, 2**70, "5"):
        with pytest.raises(ValueError, match="shard_size must be"):
            sample_shards(model_of(), tmp_path, 3, shard_size=shard_size)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write"):
        sample_shards(model_of(), tmp_path / "file", 3)


def test_several_ranks_need_a_folder(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["sample", "--model", str(folder), "--out", str(tmp_path / "a.png")])
    assert "2 ranks write into a folder" in capsys.readouterr().err


def test_run_json_says_what_it_is(tmp_path):
    model = make_model(10)
    started = time.time()
    done = sample_shards(model, tmp_path, 2, [1, 2], steps=2, ranks=Ranks(0, 1, 0))
    assert started <= done["started"] <= time.time()
    settings = json.loads((tmp_path / "run.json").read_text())
    assert settings["num"] == 2
    assert settings["options"] == {"steps": 2}
    assert settings["device"] == "cpu"
    with torch.no_grad():
        model.unet.input_conv.weight[0, 0, 0, 0] += 1e-6
    with pytest.raises(ValueError, match="another model"):
        sample_shards(model, tmp_path, 2, [1, 2], steps=2)
