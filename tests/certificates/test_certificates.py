"""Certificates state the errors that are there, and say what was not compared."""

import json
import re
import sys

import diffusers
import pytest
import torch
from safetensors.torch import save_file

import diffusion
from diffusion.certificates import FILE, certify
from diffusion.cli import main
from diffusion.models.unet import UNet
from diffusion.storage.reading import sha256
from helpers.models import make_model

SMALL = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
BATCH = 2


def pipeline(folder, scheduler=None, **options):
    """A folder of diffusers with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = diffusers.UNet2DModel(**(SMALL | options))
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50) if scheduler is None else scheduler
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def imported(source, folder, **flags):
    """The model folder that the command writes, and its certificate, without one."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    main(["import", str(source), "--out", str(folder), *words])
    return folder


def largest(entries) -> float:
    return max(entry["max_error"] for entry in entries)


@pytest.fixture
def model(tmp_path):
    """A saved model of 8x8 images, certified against files of numbers."""
    found = make_model(T=20)
    found.save(tmp_path / "model")
    return found


def reference_of(model, path, **changes):
    """A file of what the model itself computes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, 2, 8, 8, generator=generator)
    noise = torch.randn(21, BATCH, 2, 8, 8, generator=generator)
    with torch.no_grad():
        tensors = {f"forward.t{t}": model.unet(x, torch.full((BATCH,), t)) for t in (0, 7, 19)}
    tensors |= {"x": x, "traj.noise": noise}
    tensors["traj.final"] = model.sample(num_samples=BATCH, noise=lambda k: noise[k])
    tensors |= changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def test_against_diffusers_itself(tmp_path, capsys):
    source = pipeline(tmp_path / "source")
    main(["import", str(source), "--out", str(tmp_path / "model"), "--certify"])
    output = capsys.readouterr().out
    certificate = json.loads((tmp_path / "model" / FILE).read_text())
    assert certificate["original"] == f"diffusers {diffusers.__version__}"
    assert certificate["versions"]["diffusers"] == diffusers.__version__
    assert [entry["timestep"] for entry in certificate["forward"]] == [0, 12, 25, 37, 49]
    assert 0 < largest(certificate["forward"]) < 1e-5
    (trajectory,) = certificate["trajectories"]
    assert trajectory["steps"] == 10
    assert trajectory["max_error"] < 1e-4
    assert 0 < largest(certificate["float32_against_float64"]) < 1e-5
    assert f"{FILE}: against diffusers" in output
    files = {name: sha256(source / name) for name in certificate["source"]["sha256"]}
    assert certificate["source"]["sha256"] == files
    assert "unet/diffusion_pytorch_model.safetensors" in files
    for name in ("config.json", "model.safetensors"):
        assert certificate["model"]["sha256"][name] == sha256(tmp_path / "model" / name)


def test_labels_of_diffusers_are_those_of_the_table(tmp_path):
    """The null label is the first row there, the last here."""
    source = pipeline(tmp_path / "source", num_class_embeds=4)
    folder = imported(source, tmp_path / "model", null_label=0)
    certificate = certify(folder, source, flags={"null_label": 0})
    assert certificate["flags"] == {"null_label": 0}
    assert largest(certificate["forward"]) < 1e-5
    assert largest(certificate["trajectories"]) < 1e-4


def test_a_wrong_model_has_large_errors(tmp_path):
    source = pipeline(tmp_path / "source")
    folder = imported(source, tmp_path / "model")
    model = diffusion.load(folder)
    with torch.no_grad():
        model.unet.output_conv.bias += 0.5
    model.save(folder)
    certificate = certify(folder, source)
    assert all(entry["max_error"] == pytest.approx(0.5, abs=1e-4) for entry in certificate["forward"])
    assert largest(certificate["trajectories"]) > 0.01


def test_steps_of_another_scheduler_are_not_compared(tmp_path, monkeypatch):
    source = pipeline(tmp_path / "source")
    folder = imported(source, tmp_path / "model")
    monkeypatch.setattr("diffusion.certificates.diffusers_run._SCHEDULERS", ("DDIMScheduler",))
    certificate = certify(folder, source)
    assert largest(certificate["forward"]) < 1e-5
    assert not certificate["trajectories"]
    assert "not compared: DDPMScheduler is not among DDIMScheduler" in certificate["notes"][0]


def test_the_steps_of_unipc_are_compared(tmp_path):
    source = pipeline(tmp_path / "source", diffusers.UniPCMultistepScheduler(thresholding=True))
    certificate = certify(imported(source, tmp_path / "model"), source)
    assert not certificate["notes"]
    assert certificate["trajectories"][0]["max_error"] < 1e-4


def test_without_diffusers(tmp_path, monkeypatch, capsys):
    source = pipeline(tmp_path / "source")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    main(["import", str(source), "--out", str(tmp_path / "model"), "--certify"])
    certificate = json.loads((tmp_path / "model" / FILE).read_text())
    assert certificate["original"] is None
    assert not certificate["forward"]
    assert not certificate["trajectories"]
    assert certificate["float32_against_float64"]
    assert "diffusers is not installed" in certificate["notes"][0]
    assert "no original was at hand" in certificate["notes"][1]
    assert "no original was at hand" in capsys.readouterr().out


def test_against_a_file_of_numbers(model, tmp_path):
    reference = reference_of(model, tmp_path / "numbers.safetensors")
    certificate = certify(tmp_path / "model", tmp_path / "model", reference=reference)
    assert certificate["original"] == "the file numbers.safetensors"
    assert certificate["reference_sha256"] == sha256(reference)
    assert [entry["timestep"] for entry in certificate["forward"]] == [0, 19, 7]
    assert largest(certificate["forward"]) == 0
    (trajectory,) = certificate["trajectories"]
    assert trajectory == {
        "name": "traj.final",
        "sampler": "ddpm",
        "steps": 20,
        "max_error": 0.0,
        "max_value": trajectory["max_value"],
    }


def test_the_errors_are_those_of_the_numbers(model, tmp_path):
    with torch.no_grad():
        model.unet.output_conv.bias += 0.25
    reference = reference_of(model, tmp_path / "numbers.safetensors")
    certificate = certify(tmp_path / "model", tmp_path / "model", reference=reference)
    assert all(entry["max_error"] == pytest.approx(0.25, abs=1e-5) for entry in certificate["forward"])
    assert certificate["trajectories"][0]["max_error"] > 0.01


def test_float64_is_compared_with_what_the_network_gives(model, tmp_path):
    certificate = certify(tmp_path / "model", tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, 8, 8, generator=generator)
    precise = UNet(model.unet.config).double()
    precise.load_state_dict(model.unet.state_dict())
    for entry in certificate["float32_against_float64"]:
        t = torch.full((2,), entry["timestep"])
        with torch.no_grad():
            error = (model.unet(x, t).double() - precise(x.double(), t)).abs().max().item()
        assert entry["max_error"] == pytest.approx(error, rel=1e-6)


def test_numbers_by_other_names(model, tmp_path):
    """A trajectory of a named sampler, noise by its seed, and a name that is not known."""
    noise = torch.randn(6, BATCH, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    images = model.sample(num_samples=BATCH, sampler="ddim", steps=5, noise=lambda k: noise[k])
    changes = {
        "traj.final": None,
        "traj.noise": None,
        "traj.noise.seed": torch.tensor(2),
        "traj.noise.shape": torch.tensor(noise.shape),
        "traj.ddim.five": images,
        "traj.mystery": images.clone(),
    }
    reference = reference_of(model, tmp_path / "numbers.safetensors", **changes)
    certificate = certify(tmp_path / "model", tmp_path / "model", reference=reference)
    (trajectory,) = certificate["trajectories"]
    assert (trajectory["sampler"], trajectory["steps"], trajectory["max_error"]) == ("ddim", 5, 0)
    assert certificate["notes"] == ["traj.mystery of the reference is not compared: no such name is known"]


def test_no_noise_for_the_last_step_and_guidance(tmp_path):
    model = make_model(4, T=20, sampler={"name": "ddpm", "steps": 5})
    model.save(tmp_path / "model")
    noise = torch.randn(5, BATCH, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    how = {"noise": lambda k: noise[k], "guidance_scale": 2.5}
    tensors = {"traj.w1.5": model.sample([3, 1], **how), "traj.noise": noise, "y": torch.tensor([3, 1])}
    save_file(tensors, tmp_path / "numbers.safetensors")
    certificate = certify(tmp_path / "model", tmp_path / "model", reference=tmp_path / "numbers.safetensors")
    (trajectory,) = certificate["trajectories"]
    assert (trajectory["name"], trajectory["steps"], trajectory["max_error"]) == ("traj.w1.5", 5, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": None}, "forward.t0 needs x"),
        ({"traj.noise": None}, "traj.final needs traj.noise"),
        (
            {"x": torch.zeros(BATCH, 3, 8, 8)},
            "x must have shape [2, 2, 8, 8] for this model, not [2, 3, 8, 8]",
        ),
        ({"traj.final": torch.zeros(1, 2, 8, 8)}, "traj.final must have shape [2, 2, 8, 8]"),
        ({"forward.t7": torch.zeros(2, 4, 8, 8)}, "forward.t7 must have shape [2, 2, 8, 8]"),
        ({"traj.noise": torch.zeros(2, 2, 8, 8)}, "traj.noise must have shape [steps + 1, 2, 2, 8, 8]"),
        ({"forward.t20.5x": torch.zeros(1), "y": torch.tensor([0, 1])}, "the model is unconditional"),
        ({"y": torch.tensor([0.0, 1.0])}, "y must be 2 whole numbers"),
    ],
)
def test_a_file_that_does_not_fit(changes, message, model, tmp_path):
    reference = reference_of(model, tmp_path / "numbers.safetensors", **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        certify(tmp_path / "model", tmp_path / "model", reference=reference)
    assert not (tmp_path / "model" / FILE).exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reference", "a.safetensors"], "--reference belongs to --certify"),
        (["--certify", "--reference", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--certify", "--reference", "empty.safetensors"], "has nothing to compare with"),
    ],
)
def test_nothing_is_written_without_a_reference(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pipeline("source")
    save_file({"x": torch.zeros(1)}, "empty.safetensors")
    with pytest.raises(SystemExit) as error:
        main(["import", "source", "--out", "model", *words])
    assert error.value.code == 2
    output = capsys.readouterr().err
    assert message in output
    assert not (tmp_path / "model").exists()
