"""Folders of diffusers, as tests write and read them."""

import json
from pathlib import Path

import diffusers
import torch

import diffusion

NAME = "diffusion_pytorch_model"
LINEAR = {"schedule": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon"}


def outputs(unet, labels=None) -> torch.Tensor:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([3, 700])
    with torch.no_grad():
        if isinstance(unet, diffusers.UNet2DModel):
            return unet(x, t, class_labels=labels).sample
        return unet(x, t, labels)


def scaled(model: diffusers.UNet2DModel, factor: float = 0.5) -> diffusers.UNet2DModel:
    """Another model of the same configuration."""
    other = diffusers.UNet2DModel.from_config(model.config).eval()
    other.load_state_dict({name: factor * tensor for name, tensor in model.state_dict().items()})
    return other


def save_pipeline(folder: Path, model: diffusers.UNet2DModel, **options) -> None:
    diffusers.DDPMPipeline(model, diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(
        folder, **options
    )


def load(path: Path, **flags) -> diffusion.DDPM:
    return diffusion.load(path, flags=flags)


def assert_is(model: diffusion.DDPM, expected: diffusers.UNet2DModel, tolerance: float = 1e-5) -> None:
    found, right = outputs(model.unet), outputs(expected)
    assert (found - right).abs().max() <= tolerance * right.abs().max()


# Fields that EMAModel.save_pretrained adds to the configuration.
AVERAGE = {
    "decay": 0.9999,
    "inv_gamma": 1.0,
    "min_decay": 0.0,
    "optimization_step": 500,
    "power": 0.75,
    "update_after_step": 0,
    "use_ema_warmup": True,
}


def save_checkpoint(
    folder: Path, model: diffusers.UNet2DModel, average: diffusers.UNet2DModel | None
) -> None:
    """A folder checkpoint-N of diffusers' train_unconditional.py, whose accelerator saves its state there."""
    model.save_pretrained(folder / "unet")
    if average is not None:
        average.save_pretrained(folder / "unet_ema")
        path = folder / "unet_ema" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | AVERAGE))
    torch.save({"state": {}, "param_groups": [{"lr": 1e-4}]}, folder / "optimizer.bin")
    torch.save({"last_epoch": 500}, folder / "scheduler.bin")
    (folder / "random_states_0.pkl").write_bytes(b"\x80\x04.")
