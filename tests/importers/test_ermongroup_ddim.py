"""Checkpoints of ermongroup/ddim and pesser/pytorch_diffusion compute and sample what their code does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusion
from diffusion.importers import Checkpoint, ermongroup_ddim
from helpers.made_up_weights import images, weights, with_biases
from helpers.paths import FIXTURES
from helpers.thinning import exhaustive_but

# Outputs of the projects' own code in float32 on a CPU, where `helpers.made_up_weights` makes the weights,
# inputs and noise: every step-th number of the flattened output for the timesteps, and of the images of
# generalized_steps and ddpm_steps ("name, steps, skip_type, eta"), or of Diffusion.denoise.
EXPECTED = json.loads((FIXTURES / "ermongroup_ddim.json").read_text())
TRAJECTORIES = [(name, title) for name in ("list", "pooling") for title in EXPECTED[name]["images"]]


def unet(name: str) -> dict[str, torch.Tensor]:
    return weights(with_biases(EXPECTED[name]["modules"]))


def save(name: str, folder: Path) -> Path:
    """A list as the runner of ermongroup/ddim writes it, or a state dict alone."""
    tensors: Any = unet(name)
    if name == "list":  # as of DataParallel; the weights of the case are the averaged ones
        raw = {f"module.{key}": torch.full_like(tensor, 0.5) for key, tensor in tensors.items()}
        tensors = [raw, {"state": {}, "param_groups": [{"lr": 2e-4}]}, 1, 100, tensors]
    if name == "pooling":  # without an average; "bayesian" models have a variance for each timestep
        tensors = [tensors | {"logvar": torch.zeros(100)}, {"state": {}, "param_groups": []}, 1, 100]
    torch.save(tensors, folder / "ckpt.pth")
    return folder / "ckpt.pth"


def sample(model: diffusion.DDPM, step: int, **arguments: Any) -> torch.Tensor:
    shape = (2, model.unet.config.in_channels, *model.unet.config.image_shape)
    x = model.sample(num_samples=2, noise=lambda k: images(shape, 2000 + k), **arguments)
    return x.flatten()[::step]


@pytest.mark.parametrize("name", ["list", "pooling"])
def test_network(name, tmp_path):
    case = EXPECTED[name]
    model = ermongroup_ddim.load(Checkpoint(save(name, tmp_path)), **case["flags"]).unet.eval()
    shape = (2, model.config.in_channels, *model.config.image_shape)
    with torch.no_grad():
        out = model(images(shape, 1000), torch.tensor(case["timesteps"]))
    expected = torch.tensor(case["values"])
    assert expected.std() > 0.3
    assert (out.flatten()[:: case["step"]] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("trajectory", exhaustive_but(TRAJECTORIES, default=TRAJECTORIES[::2]), ids=str)
def test_samples_are_those_of_the_original_loops(trajectory, tmp_path):
    name, title = trajectory
    """DDIM does not clip, so that its images are large; the error is relative to the largest value."""
    case, path = EXPECTED[name], save(name, tmp_path)
    kind, steps, skip_type, eta = title.split()
    arguments = {"sampler": "ddim" if kind == "generalized" else "ddpm", "steps": int(steps)}
    if kind == "generalized":
        arguments["eta"] = float(eta)
    if skip_type == "quad":
        arguments["spacing"] = "quad"
    flags = {"sample_type": kind, "timesteps": int(steps), "skip_type": skip_type, "eta": float(eta)}
    expected = torch.tensor(case["images"][title])
    for more, chosen in (({}, arguments), (flags, {})):
        with pytest.warns(UserWarning, match="assumed:"):
            model = diffusion.load(path, flags=case["flags"] | more)
        error = (sample(model, case["step"], **chosen) - expected).abs().max()
        assert error <= 1e-4 * max(1, expected.abs().max() / 10)


@pytest.mark.parametrize("name", ["cifar10", "lsun"])
def test_converted_models_are_sampled_as_their_project_does(name, tmp_path):
    case = EXPECTED[name]
    variance = "fixedlarge" if name == "cifar10" else "fixedsmall"
    with pytest.warns(UserWarning, match=f"assumed: .*sample_type=ddpm_noisy var_type={variance}"):
        model = diffusion.load(save(name, tmp_path), flags=case["flags"])
    expected = torch.tensor(case["images"]["denoise"])
    assert (sample(model, case["step"]) - expected).abs().max() <= 1e-4
    model.save(tmp_path / "model")
    assert (sample(diffusion.load(tmp_path / "model"), case["step"]) - expected).abs().max() <= 1e-4


def test_weights_that_were_trained(tmp_path):
    path, flags = save("list", tmp_path), EXPECTED["list"]["flags"]
    raw = ermongroup_ddim.load(Checkpoint(path), ema=False, **flags).unet
    assert all((parameter == 0.5).all() for parameter in raw.parameters())
    with pytest.raises(ValueError, match="no moving average of the weights"):
        ermongroup_ddim.load(Checkpoint(save("pooling", tmp_path)), ema=True)


def test_a_damaged_average_is_not_replaced_by_the_weights_that_were_trained(tmp_path):
    path = save("list", tmp_path)
    contents = torch.load(path)
    del contents[-1]["conv_out.weight"]
    torch.save(contents, path)
    with pytest.raises(ValueError, match="no moving average of the weights with its UNet; the flag ema=Fal"):
        diffusion.load(path)
    assert diffusion.load(path, flags={"ema": False, **EXPECTED["list"]["flags"]})


@pytest.mark.parametrize("shape", [(), (0, 0, 0, 0), (7, 7, 1, 1)])
def test_attention_of_a_shape_that_cannot_be_joined(shape, tmp_path):
    name = next(name for name in unet("list") if name.endswith("attn_1.k.weight"))
    torch.save(unet("list") | {name: torch.ones(shape)}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt is ") as error:
        diffusion.load(tmp_path / "model.ckpt")
    assert "\n" not in str(error.value)


def test_assumed_image_size(tmp_path):
    """Published configurations have attention at 16x16; the case has it at half of the image."""
    imported = ermongroup_ddim.load(Checkpoint(save("list", tmp_path)))
    assert imported.assumed["image_size"] == imported.unet.config.sample_size == 32


def test_images_that_are_not_rescaled(tmp_path):
    flags = EXPECTED["list"]["flags"] | {"rescaled": False}
    conventions = ermongroup_ddim.load(Checkpoint(save("list", tmp_path)), **flags).conventions
    assert (conventions["value_range"], conventions["normalize"]) == ((0.0, 1.0), False)


# get_beta_schedule of ermongroup/ddim for 4 timesteps, 0.1 to 0.4.
BETAS = {
    "linear": [0.1, 0.2, 0.3, 0.4],
    "quad": [0.1, 0.1777778, 0.2777778, 0.4],
    "const": [0.4, 0.4, 0.4, 0.4],
    "jsd": [1 / 4, 1 / 3, 1 / 2, 1.0],
    "sigmoid": [0.1007418, 0.1357609, 0.3642391, 0.3992582],
}


@pytest.mark.parametrize("kind", BETAS)
def test_schedules(kind, tmp_path):
    flags = {"image_size": 8, "num_diffusion_timesteps": 4, "beta_start": 0.1, "beta_end": 0.4}
    imported = ermongroup_ddim.load(Checkpoint(save("list", tmp_path)), beta_schedule=kind, **flags)
    expected = torch.tensor(BETAS[kind], dtype=torch.float64)
    torch.testing.assert_close(imported.schedule.betas, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"img_size": 8}, "unknown flag 'img_size'; choose from: ema, image_size"),
        ({"beta_schedule": "warmup10"}, "unknown beta_schedule 'warmup10'; choose from: linear, quad"),
        ({"sample_type": "ddpm"}, "unknown sample_type 'ddpm'; choose from: generalized, ddpm_noisy"),
        ({"skip_type": "even"}, "unknown skip_type 'even'; choose from: uniform, quad"),
        ({"timesteps": 0}, r"flag timesteps must be a whole number in 1..1000"),
        ({"eta": 2}, "flag eta must be a number in"),
        ({"image_size": 7}, "cannot be halved"),
        ({"rescaled": "no"}, "flag rescaled must be true or false"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    path = save("list", tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        diffusion.load(path, flags=EXPECTED["list"]["flags"] | flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_out.weight": torch.ones(6, 32, 3, 3)}, "takes 3 channels and predicts 6"),
        ({"down.0.block.0.conv1.weight": torch.ones(1)}, "holds no whole UNet of ermongroup/ddim"),
        ({"down.0.block.0.conv_shortcut.weight": torch.ones(1)}, "1 tensors too many"),
        ({"up.0.block.0.norm1.weight": torch.ones(7)}, "of another architecture"),
    ],
)
def test_tensors_of_other_models(changes, message, tmp_path):
    torch.save(unet("list") | changes, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=message) as error:
        ermongroup_ddim.load(Checkpoint(tmp_path / "model.ckpt"), image_size=8)
    assert "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match="holds no checkpoint of ermongroup/ddim"):
        ermongroup_ddim.load(Checkpoint(tmp_path / "model.ckpt"))
