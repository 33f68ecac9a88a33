"""A program that uses the public names: `mypy --strict` accepts it, and every type that it asserts.

test_types.py runs it and compares those types with the values.
"""

from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from typing_extensions import assert_type

import diffusion
from diffusion import DDPM, NoiseSchedule, StepTable, UNet, UNetConfig, kernels, steps
from diffusion.kernels import attention
from diffusion.training.loop import train
from diffusion.training.recipe import Recipe
from diffusion.training.trainer import Trainer


def sample(folder: Path) -> None:
    model = assert_type(diffusion.load("mnist"), DDPM)
    assert_type(model.num_classes, int | None)

    def callback(i: int, x: Tensor, x0: Tensor) -> None:
        assert_type(i, int)

    images = model.sample(
        [3, 1], guidance_scale=2, sampler="ddim", steps=2, eta=0.5, device="cpu", callback=callback
    )
    assert_type(images, Tensor)
    assert_type(model.sample(num_samples=1, steps=2, noise=lambda k: torch.zeros(1, 1, 28, 28)), Tensor)
    assert_type(model.sample(3, steps=1, output="pil"), list[Image])
    assert_type(model.sample(3, steps=1, output="numpy"), np.ndarray)
    assert_type(model.explain(dtype=torch.bfloat16), str)
    assert_type(model.steps("dpm++", 3, sde=True), StepTable)
    diffusion.save_grid(images, folder / "grid.png", columns=2)
    diffusion.save_gif([images, images.numpy()], str(folder / "steps.gif"), duration=0.1)
    model.save(folder / "model", dtype=torch.float16, made="here")


def compose() -> None:
    schedule = assert_type(NoiseSchedule.cosine(T=10), NoiseSchedule)
    assert_type(schedule.T, int)
    assert_type(schedule.alphas_cumprod, Tensor)
    config = UNetConfig(8, in_channels=1, out_channels=1, channels=16, channel_mult=(1, 2), norm_groups=4)
    unet = assert_type(UNet(config), UNet)
    model = DDPM(unet, schedule, prediction_type="v_prediction", sampler_options={"ddim": {"eta": 0.5}})
    loss = model.loss(torch.zeros(2, 1, 8, 8))
    assert_type(loss, Tensor)
    table = steps.ddim(schedule, 4, eta=1.0)
    assert_type(table, StepTable)
    assert_type(len(table), int)
    assert_type(table.row(0), kernels.StepCoefficients)


def fit(folder: Path) -> None:
    unet = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "channels": 16, "channel_mult": [1]}
    recipe = Recipe(
        unet=unet | {"norm_groups": 4, "attention_levels": []},
        steps=1,
        batch_size=2,
        label_dropout=0.0,
    )
    trainer = Trainer(recipe, torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None)
    assert_type(trainer.step, int)
    assert_type(train(trainer, folder / "run", progress=False), DDPM)


def operate() -> None:
    q = torch.randn(1, 2, 4, 8)
    assert_type(attention(q, q, q, scale=0.5), Tensor)
    assert_type(kernels.attention(q, q, q, backend="reference"), Tensor)
    x, weight, bias = torch.randn(2, 4, 6, 6), torch.ones(4), torch.zeros(4)
    assert_type(kernels.group_norm_silu(x, 2, weight, bias), Tensor)
    assert_type(kernels.conv2d(x, torch.randn(3, 4, 3, 3), padding=1), Tensor)
    assert_type(kernels.philox_normal((2, 3), seed=0, sample_ids=[4, 5]), Tensor)
    assert_type(kernels.explain("attention", q, q, q), str)
    assert_type(kernels.build_info(), dict[str, str])
