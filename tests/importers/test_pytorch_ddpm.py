"""Checkpoints of w86763777/pytorch-ddpm compute and sample what its code does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffusion
from diffusion.importers import Checkpoint, pytorch_ddpm
from helpers.made_up_weights import images, weights, with_biases
from helpers.paths import FIXTURES

# Outputs of the project's own code in float32 on a CPU, where `helpers.made_up_weights` makes the weights,
# inputs and noise: every step-th number of the flattened output for the timesteps, and of the images that
# GaussianDiffusionSampler returns. The case "xstart" is of its code without the assertion on mean_type.
EXPECTED = json.loads((FIXTURES / "pytorch_ddpm.json").read_text())
TABLE = "time_embedding.timembedding.0.weight"


def unet(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    angles = torch.arange(case["T"])[:, None] * 10000.0 ** (
        -torch.arange(0, case["channels"], 2, dtype=torch.float64) / case["channels"]
    )
    table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).float()
    return weights(with_biases(case["modules"])) | {TABLE: table}


def save(case: dict[str, Any], folder: Path, **more: Any) -> Path:
    """A ckpt.pt as main.py writes it; the weights of the case are the averaged ones."""
    ema = unet(case)
    net = {name: torch.full_like(tensor, 0.5) for name, tensor in ema.items()}
    state = {"state": {0: {"step": torch.tensor(5.0)}}, "param_groups": [{"lr": 2e-4, "params": [0]}]}
    contents = {"net_model": net, "ema_model": ema, "sched": {"last_epoch": 5}, "optim": state, "step": 5}
    torch.save(contents | more, folder / "ckpt.pt")
    return folder / "ckpt.pt"


def sample(model: diffusion.DDPM, step: int) -> torch.Tensor:
    shape = (2, model.unet.config.in_channels, *model.unet.config.image_shape)
    return model.sample(num_samples=2, noise=lambda k: images(shape, 2000 + k)).flatten()[::step]


@pytest.mark.parametrize("name", EXPECTED)
def test_network_and_samples(name, tmp_path):
    case = EXPECTED[name]
    with pytest.warns(UserWarning, match="assumed: beta_1=0.0001 beta_T=0.02"):
        model = diffusion.load(save(case, tmp_path), flags=case["flags"])
    size = case["flags"]["img_size"]
    with torch.no_grad():
        out = model.unet(images((2, 3, size, size), 1000), torch.tensor(case["timesteps"]))
    assert (out.flatten()[:: case["step"]] - torch.tensor(case["values"])).abs().max() <= 1e-5
    expected = torch.tensor(case["images"])
    assert expected.abs().max() == 1.0 or name == "xstart"  # only the returned image is clipped
    assert (sample(model, case["step"]) - expected).abs().max() <= 1e-4
    model.save(tmp_path / "model")
    assert (sample(diffusion.load(tmp_path / "model"), case["step"]) - expected).abs().max() <= 1e-4


def test_weights_that_were_trained(tmp_path):
    """ema=False takes net_model, and so does a file without ema_model; a bare state dict is read as it is."""
    case = EXPECTED["attention"]
    path = save(case, tmp_path)
    raw = pytorch_ddpm.load(Checkpoint(path), ema=False, **case["flags"]).unet
    assert all((parameter == 0.5).all() for parameter in raw.parameters())
    torch.save({"net_model": unet(case)}, path)
    alone = pytorch_ddpm.load(Checkpoint(path), **case["flags"]).unet
    torch.save(unet(case), path)
    bare = pytorch_ddpm.load(Checkpoint(path), **case["flags"]).unet
    assert torch.equal(alone.input_conv.weight, bare.input_conv.weight)
    with pytest.raises(ValueError, match="no ema_model with its UNet"):
        pytorch_ddpm.load(Checkpoint(path), ema=True)


def test_a_damaged_average_is_not_replaced_by_the_weights_that_were_trained(tmp_path):
    path = save(EXPECTED["attention"], tmp_path)
    contents = torch.load(path)
    del contents["ema_model"]["tail.2.weight"]
    torch.save(contents, path)
    with pytest.raises(ValueError, match="no ema_model with its UNet; the flag ema=False takes net_model"):
        diffusion.load(path)


def test_errors_name_the_file(tmp_path):
    """Also those of a shape that the configuration of a UNet refuses."""
    torch.save(unet(EXPECTED["attention"]) | {TABLE: torch.ones(0, 0)}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=r"ckpt\.pt: learned_timesteps must be a whole number"):
        diffusion.load(tmp_path / "ckpt.pt")


def test_names_of_tensors_are_printed_in_one_line(tmp_path):
    names = {"a\nb\x1b[31m": torch.ones(1), "c" * 100_000: torch.ones(1)}
    for name, tensor in names.items():
        torch.save(unet(EXPECTED["attention"]) | {name: tensor}, tmp_path / "ckpt.pt")
        with pytest.raises(ValueError, match="1 tensors too many, such as") as error:
            diffusion.load(tmp_path / "ckpt.pt")
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 3000


def test_image_size_of_the_stored_noise(tmp_path):
    path = save(EXPECTED["attention"], tmp_path, x_T=torch.zeros(2, 3, 16, 16))
    imported = pytorch_ddpm.load(Checkpoint(path))
    assert imported.unet.config.sample_size == 16
    assert "img_size" not in imported.assumed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"image_size": 8}, "unknown flag 'image_size'; choose from: ema, img_size"),
        ({"T": 1000}, "has 20 timesteps, and flag T is 1000"),
        ({"mean_type": "xprev"}, "mean_type 'xprev' cannot be imported"),
        ({"mean_type": "v"}, "unknown mean_type 'v'; choose from: epsilon, xstart"),
        ({"var_type": "learned"}, "unknown var_type 'learned'; choose from: fixedlarge, fixedsmall"),
        ({"beta_T": 2}, "flag beta_T must be a number in"),
        ({"img_size": 7}, "cannot be halved"),
        ({"ema": 1}, "flag ema must be true or false"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    path = save(EXPECTED["attention"], tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        diffusion.load(path, flags=flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("tail.2.weight", torch.ones(6, 32, 3, 3), "takes 3 channels and predicts 6"),
        ("downblocks.0.block1.2.weight", torch.ones(()), "holds no whole UNet of pytorch-ddpm"),
        ("downblocks.9.attn.proj_q.weight", torch.ones(2), "of another architecture|no whole UNet"),
        (TABLE, torch.ones(20, 16), r"time_table.weight is \[20, 16\], not \[20, 32\]"),
    ],
)
def test_tensors_of_other_models(name, tensor, message, tmp_path):
    case = EXPECTED["attention"]
    torch.save(unet(case) | {name: tensor}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=message) as error:
        pytorch_ddpm.load(Checkpoint(tmp_path / "ckpt.pt"), **case["flags"])
    assert "\n" not in str(error.value)
