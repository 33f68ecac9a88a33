"""Reads the checkpoints of ermongroup/ddim, [model, optimizer, epoch, step, EMA], and the converted models of
pesser/pytorch_diffusion, which are a state dict of the same UNet."""

import re
from collections.abc import Callable
from typing import Any

import torch

from ..models.unet import UNetConfig
from ..process.schedule import MAX_TIMESTEPS, NoiseSchedule
from ..storage.checkpoint import load_network
from ..utils.validation import choice, known_names, number, switch, whole_number
from ..utils.words import counted
from .checkpoint_file import Checkpoint, state_dict
from .imported import Imported
from .naming import Parts, Source, convert, separate_attention

NAME = "ermongroup-ddim"
HUB_FILES: tuple[str, ...] = ()  # read from a local file only
FLAGS = {
    "ema": "False takes the weights that were trained instead of their moving average",
    "image_size": "height and width of the images",
    "num_diffusion_timesteps": "number of timesteps",
    "beta_schedule": "linear, quad, const, jsd or sigmoid",
    "beta_start": "first beta of the schedule",
    "beta_end": "last beta of the schedule",
    "sample_type": "the model's own sampler: generalized (DDIM) or ddpm_noisy (ancestral)",
    "eta": "noise of generalized sampling, 0 to 1",
    "timesteps": "number of steps of the model's own sampler; all timesteps by default",
    "skip_type": "spacing of the steps: uniform or quad",
    "var_type": "variance of a step of ancestral sampling: fixedlarge or fixedsmall",
    "rescaled": "False for images in [0, 1], True for images in [-1, 1]",
    "dropout": "probability of dropout in training",
}
_DEFAULTS: dict[str, Any] = {
    "num_diffusion_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "rescaled": True,
    "dropout": 0.1,
}
_SCHEDULES: dict[str, Callable[[int, float, float], NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "quad": NoiseSchedule.scaled_linear,
    "const": lambda T, start, end: NoiseSchedule.from_betas([end] * T),
    "jsd": lambda T, start, end: NoiseSchedule.from_betas([1 / n for n in range(T, 0, -1)]),
    "sigmoid": NoiseSchedule.sigmoid,
}
_VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
_MARKS = ("temb.dense.0.weight", "conv_in.weight", "mid.block_1.norm1.weight", "conv_out.weight")
_WITH_AVERAGE = 5  # entries of a list that ends with the moving average
_RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "skip": "nin_shortcut"}
_ATTENTION = separate_attention("norm", "q", "k", "v", "proj_out")


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the file holds a UNet with the names of ermongroup/ddim, or a list that begins with one."""
    return not checkpoint.is_folder and bool(_unets(checkpoint))


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """The UNet of a checkpoint, and the process of its project.

    flags: see `FLAGS`. A list is sampled as `main.py --sample` of ermongroup/ddim does, by DDIM with eta 0
    that never clips; a state dict alone as `Diffusion.denoise` of pesser/pytorch_diffusion does, by ancestral
    sampling that clips predicted images to [-1, 1]. The flag sample_type chooses the other. Both have all T
    steps; fewer are at multiples of T // steps ("uniform"). ValueError, in one line: another file, or a flag
    that is unknown or out of range.
    """
    known_names("flag", flags, FLAGS)
    unets, origin = _unets(checkpoint), str(checkpoint)
    is_list = isinstance(checkpoint.contents, list)
    ema = switch("flag ema", flags.get("ema", is_list and len(checkpoint.contents) >= _WITH_AVERAGE))
    if (which := "ema" if ema else "model") not in unets:
        missing = "moving average of the weights with its UNet" if ema else _MARKS[0]
        hint = "; the flag ema=False takes those that were trained" if ema and unets else ""
        raise ValueError(f"{origin} holds no checkpoint of ermongroup/ddim: no {missing}{hint}")
    tensors = unets[which]
    config = _config(tensors, flags, origin)
    unet = load_network(config, _convert(config, tensors, origin), checkpoint.path)
    assumed = _DEFAULTS | {
        "image_size": config.sample_size,
        "sample_type": "generalized" if is_list else "ddpm_noisy",
        # Of the converted models, the one for CIFAR-10 has the large variance, those for LSUN the small one.
        "var_type": "fixedlarge" if is_list or config.channel_mult == (1, 2, 2, 2) else "fixedsmall",
    }
    options = {"eta": 0.0} | assumed | flags
    conventions = _conventions(options)
    return Imported(
        unet, _schedule(options), conventions, {k: v for k, v in assumed.items() if k not in flags}
    )


def _unets(checkpoint: Checkpoint) -> dict[str, dict[str, torch.Tensor]]:
    """The state dicts "model" and "ema", as far as the file holds them."""
    contents = checkpoint.contents
    found = {"model": checkpoint.tensors}
    if isinstance(contents, list):
        found = {"model": state_dict(contents[0] if contents else None)}
        if len(contents) >= _WITH_AVERAGE:
            found["ema"] = state_dict(contents[-1])
    return {key: tensors for key, tensors in found.items() if all(mark in tensors for mark in _MARKS)}


def _schedule(options: dict[str, Any]) -> NoiseSchedule:
    T = whole_number("flag num_diffusion_timesteps", options["num_diffusion_timesteps"], 1, MAX_TIMESTEPS)
    start, end = (number(f"flag {key}", options[key], above=0, below=1) for key in ("beta_start", "beta_end"))
    return _SCHEDULES[choice("beta_schedule", options["beta_schedule"], _SCHEDULES)](T, start, end)


def _conventions(options: dict[str, Any]) -> dict[str, Any]:
    T = options["num_diffusion_timesteps"]
    steps = whole_number("flag timesteps", options.get("timesteps", T), 1, T)
    spacing = choice("skip_type", options.get("skip_type", "uniform"), ("uniform", "quad"))
    generalized = (
        choice("sample_type", options["sample_type"], ("generalized", "ddpm_noisy")) == "generalized"
    )
    eta = number("flag eta", options["eta"], 0, 1)
    ddim, ddpm = {"spacing": spacing, "clip": None, "eta": eta}, {"spacing": spacing, "clip": 1.0}
    conventions: dict[str, Any] = {
        "prediction_type": "epsilon",
        "variance": _VARIANCES[choice("var_type", options["var_type"], _VARIANCES)],
        "clip": None if generalized else 1.0,
        "sampler": {"name": "ddim" if generalized else "ddpm", "steps": steps},
        "sampler_options": {"ddim": ddim, "ddpm": ddpm},
    }
    if not switch("flag rescaled", options["rescaled"]):
        conventions |= {"value_range": (0.0, 1.0), "normalize": False}
    return conventions


def _config(tensors: dict[str, torch.Tensor], flags: dict[str, Any], origin: str) -> UNetConfig:
    """The configuration, from the names and shapes of the tensors."""

    def count(pattern: str) -> int:
        found = (re.match(pattern, name) for name in tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    levels, blocks = count(r"down\.(\d{1,2})\."), count(r"down\.0\.block\.(\d{1,2})\.")
    convs = [tensors.get(f"down.{level}.block.0.conv1.weight") for level in range(levels)]
    first, last = tensors["conv_in.weight"], tensors["conv_out.weight"]
    if not levels or any(t is None or t.ndim != 4 for t in (*convs, first, last)):
        raise ValueError(f"{origin} holds no whole UNet of ermongroup/ddim")
    if last.shape[0] != first.shape[1]:
        raise ValueError(
            f"{origin} cannot be sampled: it takes {counted(first.shape[1], 'channel')} and "
            f"predicts {last.shape[0]}"
        )
    channels, widths = first.shape[0], [conv.shape[0] for conv in convs if conv is not None]
    attention = tuple(i for i in range(levels) if f"down.{i}.attn.0.norm.weight" in tensors)
    # Attention is at 16x16 in all published configurations.
    size = 16 * 2 ** attention[0] if attention else 2 ** (levels + 2)
    resampling = "conv" if "down.0.downsample.conv.weight" in tensors else "plain"
    return UNetConfig(
        sample_size=whole_number("flag image_size", flags.get("image_size", size), 1),
        in_channels=first.shape[1],
        out_channels=first.shape[1],
        channels=channels,
        channel_mult=tuple(w // channels if w % channels == 0 else w / channels for w in widths),
        input_width=None if widths[0] == channels else channels,
        num_res_blocks=blocks,
        attention_levels=attention,
        downsample=resampling,
        upsample=resampling,
        downsample_padding="asymmetric",
        norm_groups=32,
        norm_eps=1e-6,
        dropout=number("flag dropout", flags.get("dropout", _DEFAULTS["dropout"]), 0, below=1),
    )


def _convert(config: UNetConfig, tensors: dict[str, torch.Tensor], origin: str) -> dict[str, torch.Tensor]:
    """The state dict of the package's UNet."""
    parts = Parts(
        [
            ("time_mlp.0", "temb.dense.0"),
            ("time_mlp.2", "temb.dense.1"),
            ("input_conv", "conv_in"),
            ("output_norm", "norm_out"),
            ("output_conv", "conv_out"),
        ],
        [],
        [],
    )

    def level(way: str, i: int, count: int, how: str | None) -> None:
        for n in range(count):
            parts.residual.append((f"{way}.{i}.blocks.{n}", f"{way}.{i}.block.{n}"))
            if i in config.attention_levels:
                parts.attention.append((f"{way}.{i}.attentions.{n}", f"{way}.{i}.attn.{n}"))
        if how == "conv":
            parts.plain.append((f"{way}.{i}.resample.conv", f"{way}.{i}.{way}sample.conv"))

    for i, how in enumerate(config.level_downsample):
        level("down", i, config.level_blocks[i], how)
    parts.residual.extend([("mid.blocks.0", "mid.block_1"), ("mid.blocks.1", "mid.block_2")])
    parts.attention.append(("mid.attention", "mid.attn_1"))
    for i, how in reversed(list(enumerate(config.level_upsample))):
        level("up", i, config.level_blocks[i] + 1, how)
    # A "bayesian" model has a variance for each timestep, which no sampler uses.
    weights = {name: tensor for name, tensor in tensors.items() if name != "logvar"}
    return convert(Source(weights, origin), parts, _RESIDUAL, "temb_proj", _ATTENTION)
