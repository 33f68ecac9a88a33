"""The numbers of an original, and the errors of a model against them."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..ddpm import DDPM
from ..models.structure import config_of
from ..process.noise_levels import NoiseLevels


@dataclass
class Forward:
    """An output of the original's network: `output` [B, out_channels, H, W] at one timestep for all of x."""

    name: str
    timestep: int | float
    output: Tensor
    labelled: bool = True  # with the labels of the original, not without any


@dataclass
class Trajectory:
    """Images [B, C, H, W] that the original sampled from given noise.

    sampler: a name of `samplers.SAMPLERS`, or None for the model's own. steps: their number.
    """

    name: str
    images: Tensor
    sampler: str | None
    steps: int
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class Original:
    """The numbers that the original computed.

    about: what it is, in words. x: inputs [B, C, H, W] of the network. labels: int64 [B], as the model counts
    them, or None. noise: [n + 1, B, C, H, W], the initial noise and that of each step, or None. notes:
    reasons why something was not compared. version: of diffusers, if it ran.
    """

    about: str
    x: Tensor
    labels: Tensor | None
    forwards: list[Forward]
    trajectories: list[Trajectory]
    noise: Tensor | None
    notes: list[str]
    version: str | None = None


def forward_errors(model: DDPM, original: Original) -> list[dict[str, Any]]:
    """The error of the model's network for each output of the original."""
    errors = []
    for forward in original.forwards:
        labels = original.labels if forward.labelled else None
        found = predict(model.unet, original.x, forward.timestep, labels)
        entry = {"name": forward.name, "timestep": forward.timestep}
        errors.append(entry | error_of(found, forward.output))
    return errors


def trajectory_errors(model: DDPM, original: Original) -> list[dict[str, Any]]:
    """The error of the model's images for each trajectory of the original."""
    errors = []
    for trajectory in original.trajectories:
        assert original.noise is not None
        noise = original.noise.float()

        def drawn(k: int, noise: Tensor = noise) -> Tensor:
            return noise[k]

        images = model.sample(
            original.labels,
            num_samples=len(trajectory.images),
            sampler=trajectory.sampler,
            steps=trajectory.steps,
            noise=drawn,
            **trajectory.arguments,
        )
        entry = {"name": trajectory.name, "sampler": trajectory.sampler or model.chosen_sampler()[0]}
        errors.append(entry | {"steps": trajectory.steps} | error_of(images, trajectory.images))
    return errors


def rounding_errors(
    model: DDPM, x: Tensor, timesteps: list[int | float], labels: Tensor | None
) -> list[dict[str, Any]]:
    """The error of the model's network in float32 against the same network in float64."""
    precise, errors = copy.deepcopy(model.unet).double(), []
    for timestep in timesteps:
        expected = predict(precise, x.double(), timestep, labels)
        found = predict(model.unet, x, timestep, labels)
        errors.append({"timestep": timestep} | error_of(found, expected))
    return errors


def predict(network: nn.Module, x: Tensor, timestep: int | float, labels: Tensor | None) -> Tensor:
    """The output of a network for x [B, C, H, W], all at one timestep."""
    timesteps = torch.full((len(x),), timestep, device="cpu")  # int64 or float32, as the timestep is
    with torch.inference_mode():
        return network(x, timesteps, labels)


def error_of(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """The largest error, and the largest of the expected numbers; None for an error that is not finite."""
    error = (found.double() - expected.double()).abs().max().item()
    return {
        "max_error": error if math.isfinite(error) else None,
        "max_value": expected.double().abs().max().item(),
    }


def timesteps_of(model: DDPM) -> list[int | float]:
    """A few timesteps of the model's process, from the least noisy to the most; or noise levels."""
    schedule = model.schedule
    if isinstance(schedule, NoiseLevels):
        low, high = schedule.sigma_min or 0.01, schedule.sigma_max or 80.0
        return [low, (low * high) ** 0.5, high]
    T = schedule.T
    return sorted({0, T // 4, T // 2, 3 * T // 4, T - 1})


def inputs_of(model: DDPM, batch: int = 2) -> tuple[Tensor, Tensor | None]:
    """Inputs x [B, C, H, W] ~ N(0, I) of the model's network, and labels where it takes some."""
    config, generator = config_of(model.unet), torch.Generator().manual_seed(0)
    x = torch.randn(batch, config.in_channels, *config.image_shape, generator=generator, device="cpu")
    if config.label_size is not None:
        return x, torch.randn(batch, config.label_size, generator=generator, device="cpu")
    labels = None if config.num_classes is None else torch.arange(batch, device="cpu") % config.num_classes
    return x, labels
