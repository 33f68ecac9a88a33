"""Reads the numbers of an original from a safetensors file; docs/interoperability.md describes it."""

import math
import os
import re
from pathlib import Path

import torch
from torch import Tensor

from ..ddpm import DDPM
from ..models.structure import config_of
from ..process.noise_levels import NoiseLevels
from ..samplers import SAMPLERS
from ..storage.reading import read_safetensors
from ..utils.memory import check_fits
from ..utils.validation import whole_numbers
from .original import Forward, Original, Trajectory

_FORWARD = re.compile(r"forward\.(?:(cond|null)\.)?t(\d+(?:\.\d+)?)")
_TRAJECTORY = re.compile(r"traj\.([^.]+)(?:\..*)?")
_GUIDED = re.compile(r"traj\.w(\d+(?:\.\d+)?)")
_OWN = "final"  # the trajectory of the model's own sampler
_OTHER = ("x", "y", "t", "traj.noise", "traj.noise.seed", "traj.noise.shape", "traj.w")


def read_reference(path: str | os.PathLike, model: DDPM) -> Original:
    """The numbers in a file, for a model that they are to be compared with.

    ValueError, in one line, if the file is missing or damaged, has neither outputs nor trajectories, or holds
    a tensor of a shape that does not fit the model.
    """
    tensors, config = read_safetensors(path), config_of(model.unet)
    image = [config.in_channels, *config.image_shape]
    forwards, trajectories, notes = [], [], []
    noise = _noise(path, tensors)
    guided = {"guidance_scale": 1 + float(tensors["traj.w"])} if "traj.w" in tensors else {}
    for name, tensor in sorted(tensors.items()):
        if match := _FORWARD.fullmatch(name):
            timestep = float(match[2]) if "." in match[2] else int(match[2])
            forwards.append(Forward(name, timestep, tensor, match[1] != "null"))
        elif name in _OTHER:
            continue
        elif noise is not None and (match := _GUIDED.fullmatch(name)):
            how = {"guidance_scale": 1 + float(match[1])}
            trajectories.append(Trajectory(name, tensor, None, _steps(model, None, noise), how))
        elif (match := _TRAJECTORY.fullmatch(name)) and match[1] in (_OWN, *SAMPLERS):
            if noise is None:
                raise ValueError(f"{path}: {name} needs traj.noise, the noise that it was sampled from")
            sampler = None if match[1] == _OWN else match[1]
            trajectories.append(Trajectory(name, tensor, sampler, _steps(model, sampler, noise), guided))
        else:
            notes.append(f"{name} of the reference is not compared: no such name is known")
    if not forwards and not trajectories:
        raise ValueError(f"{path} has nothing to compare with, such as forward.t0 or traj.final")
    x = tensors.get("x")
    if x is None and forwards:
        raise ValueError(f"{path}: {forwards[0].name} needs x, the inputs of the network")
    x = torch.empty(0, *image, device="cpu") if x is None else x.float()
    labels = tensors.get("y")
    shapes = [("x", x, image)] + [(f.name, f.output, [config.out_channels, *image[1:]]) for f in forwards]
    shapes += [(t.name, t.images, image) for t in trajectories]
    count = max(tensor.shape[0] if tensor.ndim else 0 for _, tensor, _ in shapes)
    for name, tensor, shape in shapes:
        if list(tensor.shape) != [count, *shape] and tensor.numel():
            raise ValueError(
                f"{path}: {name} must have shape {[count, *shape]} for this model, not {list(tensor.shape)}"
            )
    if noise is not None and (len(noise) < 2 or list(noise.shape[1:]) != [count, *image]):
        sizes = ", ".join(map(str, [count, *image]))
        raise ValueError(f"{path}: traj.noise must have shape [steps + 1, {sizes}], not {list(noise.shape)}")
    if labels is not None and (labels.shape != (count,) or labels.is_floating_point()):
        raise ValueError(f"{path}: y must be {count} whole numbers, a label for each image")
    if config.num_classes is None and labels is not None:
        raise ValueError(f"{path} has labels y, but the model is unconditional")
    labels = None if labels is None else labels.long()
    return Original(f"the file {Path(path).name}", x, labels, forwards, trajectories, noise, notes)


def _steps(model: DDPM, sampler: str | None, noise: Tensor) -> int:
    """The number of steps that the noise is for. A sampler that adds none in the last needs none for it."""
    own = model.chosen_sampler(sampler)[1]
    if own is None and not isinstance(model.schedule, NoiseLevels):
        own = model.schedule.T
    return own if len(noise) == own else len(noise) - 1


def _noise(path: str | os.PathLike, tensors: dict[str, Tensor]) -> Tensor | None:
    """traj.noise, or the numbers that its seed and shape stand for."""
    if "traj.noise.seed" not in tensors or "traj.noise.shape" not in tensors:
        return tensors.get("traj.noise")
    shape = whole_numbers(f"{path}: traj.noise.shape", tensors["traj.noise.shape"], 1, 2**20).tolist()
    seed = whole_numbers(f"{path}: traj.noise.seed", tensors["traj.noise.seed"].reshape(-1), 0)
    check_fits(f"the noise of {path}", 4 * math.prod(shape), torch.device("cpu"))
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(seed[0])), device="cpu")
