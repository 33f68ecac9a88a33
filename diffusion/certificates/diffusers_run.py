"""Runs diffusers itself on a folder of its own, for the numbers that an imported model must give."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ddpm import DDPM
from ..importers.checkpoint_file import Checkpoint
from ..importers.diffusers_files import Layout, find, read_weights
from ..process.value_range import SIGNED, change_range
from ..storage.reading import read_json
from ..utils.errors import first_line
from .original import Forward, Original, Trajectory, inputs_of, timesteps_of

# Schedulers whose steps on x_t itself are those of a sampler of this package.
_SCHEDULERS = ("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
STEPS = 10  # of the trajectory


def run_diffusers(path: Path, model: DDPM, flags: dict[str, Any]) -> tuple[Original | None, list[str]]:
    """The numbers of diffusers with the folder's UNet2DModel and scheduler, or None and the reasons.

    flags: those of the import. The trajectory is the scheduler's own loop with at most STEPS steps, at the
    defaults of its pipeline's call.
    """
    try:
        import diffusers
    except ImportError:
        return None, ["diffusers is not installed, so the original did not run"]
    layout = find(Checkpoint(path), flags.get("weights"))
    try:
        unet = _unet(diffusers, layout, flags).eval()
    except Exception as error:  # its errors are of many kinds
        return None, [f"diffusers {diffusers.__version__} cannot load the UNet: {first_line(error)}"]
    x, labels = inputs_of(model)
    theirs = _their_labels(labels, flags.get("null_label"))
    version = diffusers.__version__
    original = Original(f"diffusers {version}", x, labels, [], [], None, [], version)
    with torch.inference_mode():
        for t in timesteps_of(model):
            output = unet(x, torch.full((len(x),), t, device="cpu"), class_labels=theirs).sample
            original.forwards.append(Forward(f"forward.t{t}", t, output))
        if layout.scheduler is None or "schedule" in flags:
            original.notes.append("no trajectory is compared: the folder has no scheduler of its own")
        else:
            _add_trajectory(diffusers, original, layout.scheduler, unet, theirs, model)
    return original, []


def _unet(diffusers: Any, layout: Layout, flags: dict[str, Any]) -> Any:
    """The UNet2DModel of a folder in float32, by diffusers itself where it reads this layout of the files."""
    if layout.weights is None:
        variant = read_weights(layout, flags.get("variant"))[2]
        try:
            return diffusers.UNet2DModel.from_pretrained(
                layout.unet, variant=variant, torch_dtype=torch.float32, low_cpu_mem_usage=False
            )
        except (OSError, ValueError):  # a layout that only the importer reads, such as pytorch_model.bin
            pass
    unet = diffusers.UNet2DModel.from_config(read_json(layout.unet / "config.json"))
    tensors = read_weights(layout, flags.get("variant"))[1]
    unet.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return unet


def _their_labels(labels: Tensor | None, null_label: int | None) -> Tensor | None:
    """The rows of diffusers' table for labels of the model, whose null label is the last."""
    if labels is None or null_label is None:
        return labels
    return labels + (labels >= null_label)


def _add_trajectory(
    diffusers: Any, original: Original, path: Path, unet: Any, labels: Tensor | None, model: DDPM
) -> None:
    """Adds the images of the scheduler's own loop and the noise that it drew, or a note why not."""
    config = read_json(path)
    name = config.get("_class_name", "DDPMScheduler")
    if name not in _SCHEDULERS:
        original.notes.append(f"the trajectory is not compared: {name} is not among {', '.join(_SCHEDULERS)}")
        return
    scheduler = getattr(diffusers, name).from_config(config)
    steps = min(STEPS, model.schedule.T)
    draws = "generator" in inspect.signature(scheduler.step).parameters
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(original.x.shape, generator=generator, device="cpu")
    noise = [x]
    try:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            output = unet(x, t, class_labels=labels).sample
            before = generator.get_state()
            own = {"generator": generator} if draws else {}
            x = scheduler.step(output, t, x, **own).prev_sample
            again = torch.Generator()  # the step's own draw, a second time; unused where it drew nothing
            again.set_state(before)
            noise.append(torch.randn(x.shape, generator=again, device="cpu"))
    except Exception as error:  # its errors are of many kinds
        original.notes.append(f"the trajectory is not compared: diffusers fails with {first_line(error)}")
        return
    x = change_range(x, SIGNED, model.value_range)
    if model.clip_output:
        x = x.clamp(*model.value_range)
    original.noise = torch.stack(noise)
    original.trajectories.append(Trajectory(f"{name}.{steps}", x, None, steps, {"guidance_scale": 1.0}))
