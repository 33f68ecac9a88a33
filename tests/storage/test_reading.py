"""Files that users name are read, or refused in one line that names them; nothing waits for a pipe."""

import contextlib
import errno
import hashlib
import os
import shutil
import signal
import socket
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import diffusion
from diffusion.classifier import BUNDLED as CLASSIFIER
from diffusion.classifier import load_classifier
from diffusion.data.image_folder import read_images
from diffusion.data.npz import load_images
from diffusion.evaluation.features import load_features
from diffusion.evaluation.shards import sample_shards
from diffusion.importers import Checkpoint, diffusers, guided_diffusion, openai_unet
from diffusion.storage import reading
from diffusion.storage.images import save_npz
from diffusion.training.log_file import LogFile
from diffusion.training.recipe import load_recipe
from diffusion.training.state import read_state
from helpers.models import make_model


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """A machine of 64 GiB: some have more memory than the sparse files here hold."""
    for module in (reading, diffusion.utils.memory):
        monkeypatch.setattr(module, "total_memory", lambda device: 2**36)


@pytest.fixture(autouse=True)
def impatient():
    """A read that waits for a pipe fails instead of hanging."""

    def ring(number, frame):
        raise AssertionError("it hangs")

    former = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


def pipe(path):
    os.mkfifo(path)


def link_to_pipe(path):
    os.mkfifo(f"{path}.pipe")
    path.symlink_to(f"{path}.pipe")


def device(path):
    path.symlink_to("/dev/zero")


def listening(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name must be short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def folder(path):
    path.mkdir()


def sparse(path):
    """A terabyte that takes no room."""
    with open(path, "wb") as file:
        file.truncate(2**40)


KINDS = {
    pipe: "a pipe",
    link_to_pipe: "a pipe",
    device: "a device",
    listening: "no regular file",
    folder: "a folder",
    sparse: "1,024 GiB",
}


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("read", [reading.read_bytes, reading.read_json, reading.read_safetensors,
                                  reading.read_torch, reading.sha256])  # fmt: skip
def test_what_is_no_file_of_a_fitting_size(make, read, tmp_path):
    make(tmp_path / "name")
    with pytest.raises(ValueError, match=f"cannot read .*name: .*{KINDS[make]}") as caught:
        read(tmp_path / "name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "none is missing"),
        ("n" * 300, "cannot read .*nnn: File name too long"),
        ("file/a", "cannot read .*file/a: Not a directory"),
        ("round", "cannot read .*round: .*symbolic links"),
        ("a\0b", "cannot read .*a\\\\0b: embedded null"),
    ],
)
def test_what_cannot_be_opened(name, said, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for read in (reading.read_bytes, reading.read_json, reading.read_safetensors, reading.read_torch):
        with pytest.raises(ValueError, match=said):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "read",
    [
        diffusion.load,
        read_images,
        load_images,
        load_classifier,
        lambda path: load_images(f"{path}.npz"),
        lambda path: load_recipe(f"{path}.json"),
        lambda path: guided_diffusion.load(Checkpoint(f"{path}.pt")),
        lambda path: make_model().save(path),
        lambda path: make_model().save(path / "new"),
    ],
)
def test_names_of_which_the_system_tells_nothing(read, tmp_path, monkeypatch):
    """Names that are too long, cyclic links, and names in a folder that may not be entered."""
    (tmp_path / "round").symlink_to(tmp_path / "round")
    stat, opened = os.stat, os.open
    for refuse, function in (("stat", stat), ("open", opened)):

        def denied(path, *arguments, function=function, **options):
            if "closed/" in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", path)
            return function(path, *arguments, **options)

        monkeypatch.setattr(os, refuse, denied)
    for name in ("n" * 300, "n" * 5000, "round", "closed/a"):
        with pytest.raises(ValueError, match=r"nnn|round|closed") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_bytes_are_those_of_the_file_and_bounded(tmp_path):
    data = os.urandom(3 * 2**20 + 1)
    (tmp_path / "data").write_bytes(data)
    (tmp_path / "link").symlink_to("data")
    assert reading.read_bytes(tmp_path / "link") == data
    assert reading.read_bytes(tmp_path / "data", len(data)) == data
    assert reading.sha256(tmp_path / "data") == hashlib.sha256(data).hexdigest()
    with pytest.raises(ValueError, match=r"data: it is larger than 3 MiB, at 3 MiB"):
        reading.read_bytes(tmp_path / "data", len(data) - 1)


def test_files_are_closed(tmp_path):
    (tmp_path / "data").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/dev/fd"))
    for name in ("data", "pipe", "none"):
        for read in (reading.read_bytes, reading.read_json, reading.read_torch, reading.sha256):
            with contextlib.suppress(ValueError):
                read(tmp_path / name)
    assert len(os.listdir("/dev/fd")) == before


def model_folder(path, name):
    make_model(10).save(path)
    return path / name, lambda: diffusion.load(path)


def diffusers_folder(path, name):
    diffusion.to_diffusers(make_model(), path)
    return path / name, lambda: diffusers.load(Checkpoint(path))


def classifier_folder(path, name):
    shutil.copytree(CLASSIFIER, path)
    return path / name, lambda: load_classifier(path)


def image_folder(path, name):
    (path / "a").mkdir(parents=True)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(path / "a" / "1.png")
    (path / name).write_bytes(b"")
    return path / name, lambda: read_images(path)


def run_of_shards(path, name):
    options = {"shard_size": 2, "steps": 2, "sampler": "ddim"}
    model = make_model()
    sample_shards(model, path, 2, **options)
    return path / name, lambda: sample_shards(model, path, 2, **options)


def alone(read):
    return lambda path, name: (path.mkdir(), path / name, lambda: read(path / name))[1:]


USED = [
    (model_folder, "config.json"),
    (model_folder, "model.safetensors"),
    (diffusers_folder, "unet/config.json"),
    (diffusers_folder, "scheduler/scheduler_config.json"),
    (diffusers_folder, "unet/diffusion_pytorch_model.safetensors"),
    (alone(lambda path: guided_diffusion.load(Checkpoint(path))), "model.pt"),
    (classifier_folder, "config.json"),
    (classifier_folder, "model.safetensors"),
    (classifier_folder, "statistics.safetensors"),
    (alone(load_features), "classifier"),
    (image_folder, "a/2.png"),
    (image_folder, "dataset.json"),
    (alone(read_images), "set.zip"),
    (alone(load_images), "arrays.npz"),
    (alone(lambda path: load_images(path.parent)), "shard-00000.npz"),
    (run_of_shards, "run.json"),
    (alone(load_recipe), "recipe.json"),
    (alone(read_state), "state.safetensors"),
    (alone(lambda path: LogFile(path, logged=1)), "log.csv"),
]


@pytest.mark.parametrize("make", [pipe, device, listening, sparse])
@pytest.mark.parametrize(("place", "name"), USED)
def test_every_file_that_is_read_is_checked(place, name, make, tmp_path):
    path, read = place(tmp_path / "there", name)
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(ValueError, match=os.path.basename(name)) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_a_pipe_is_no_shard(tmp_path):
    path, read = run_of_shards(tmp_path / "run", "shard-00000.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    read()
    assert path.read_bytes() == whole
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"cannot write .*shard-00000\.npz: it is a device or the like"):
        read()


def test_a_cache_that_is_a_pipe(tmp_path):
    image_folder(tmp_path / "set", "a/notes.txt")
    read_images(tmp_path / "set", cache=tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"cannot write .*\.npy: it is a device or the like"):
        read_images(tmp_path / "set", cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.zeros(2, dtype=torch.int64), "int64"),
        (torch.zeros(2, dtype=torch.bool), "bool"),
        (torch.zeros(2, dtype=torch.uint16), "uint16"),
        (torch.zeros(2, dtype=torch.complex64), "complex64"),
        (torch.tensor([1.0, 1e300], dtype=torch.float64), "beyond the range of float32"),
        (torch.tensor([1.0, -3.5e38], dtype=torch.float64), "beyond the range of float32"),
        (torch.tensor([1.0, float("nan")]), "NaN or infinite"),
    ],
)
def test_what_is_no_weight_is_named(tensor, said, tmp_path):
    """Tensors that are not weights are named: in a model, a diffusers folder, a .pt file, a classifier."""
    module = torch.nn.Linear(1, 2)
    weights = {"weight": torch.zeros(2, 1), "bias": tensor}
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    for read in (reading.read_safetensors, reading.read_torch):
        name = "w.safetensors" if read is reading.read_safetensors else "w.pt"
        with pytest.raises(ValueError, match=rf"{name}: bias holds .*{said}") as caught:
            reading.load_weights(module, read(tmp_path / name), tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_become_float32(dtype, tmp_path):
    module = torch.nn.Linear(3, 2)
    weights = {name: tensor.detach().to(dtype) for name, tensor in module.state_dict().items()}
    save_file(weights, tmp_path / "w.safetensors")
    other = torch.nn.Linear(3, 2)
    reading.load_weights(other, reading.read_safetensors(tmp_path / "w.safetensors"), "w")
    for name, tensor in other.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[name].float())


def test_counters_keep_their_dtype():
    module, other = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    module(torch.randn(4, 2))
    reading.load_weights(other, module.state_dict(), "w")
    assert other.num_batches_tracked.dtype == torch.int64
    assert other.num_batches_tracked == 1
    with pytest.raises(ValueError, match="num_batches_tracked holds int32"):
        reading.load_weights(other, module.state_dict() | {"num_batches_tracked": torch.tensor(1).int()}, "w")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: {"a": torch.zeros(2).to_sparse()}, "sparse"),
        (lambda: {"a": torch.empty(2, device="meta")}, "a holds no numbers|holds more than tensors"),
        (lambda: {"a": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)}, "qint8"),
        (lambda: {"a": torch.zeros(1).expand(2**40)}, "the tensors in .*w.pt take 4,096 GiB"),
        (lambda: {1: torch.zeros(1)}, "no state dict"),
        (lambda: {"a": [torch.zeros(1)]}, "no state dict"),
    ],
)
def test_what_a_pt_file_can_hold(make, said, tmp_path):
    torch.save(make(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=said):
        openai_unet.convert_weights(
            make_model().unet.config, reading.read_torch(tmp_path / "w.pt"), origin=str(tmp_path / "w.pt")
        )


def test_zips_and_arrays_are_read_as_before(tmp_path):
    image_folder(tmp_path / "set", "a/notes.txt")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.write(tmp_path / "set" / "a" / "1.png", "a/1.png")
    assert torch.equal(read_images(tmp_path / "set.zip").images, read_images(tmp_path / "set").images)
    x = torch.rand(3, 1, 4, 4) * 2 - 1
    save_npz(x, tmp_path / "x.npz")
    assert torch.equal(load_images(tmp_path / "x.npz").images, diffusion.storage.images.to_uint8(x))
    assert load_file(CLASSIFIER / "model.safetensors").keys() == load_classifier()[0].state_dict().keys()


def test_an_expanded_number_is_looked_at_once():
    """A small file can hold a large tensor of one number."""
    large = torch.ones(1, dtype=torch.float16).expand(2**40)
    reading.check_finite({"large": large}, "file")
    with pytest.raises(ValueError, match="file: large holds NaN"):
        reading.check_finite({"large": torch.tensor([torch.nan]).expand(2**40)}, "file")


def test_a_pickle_that_unpacks_to_far_more_than_the_file_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"(" * (reading.MAX_PACKED_PICKLE + 1))
        file.writestr("archive/version", "3\n")
    with pytest.raises(ValueError, match="its pickle is packed, and too large"):
        diffusion.load(tmp_path / "model.pt")
