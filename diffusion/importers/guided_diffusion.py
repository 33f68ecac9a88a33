"""Reads the .pt checkpoints of OpenAI's improved-diffusion and guided-diffusion.

Such a file holds tensors only; users of those projects describe the model by flags on the command line.
`load` takes the same flags, with guided-diffusion's defaults.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.unet import UNet, UNetConfig
from ..process.schedule import MAX_TIMESTEPS, NoiseSchedule
from ..storage.reading import load_weights, read_torch
from ..utils.validation import choice, known_names, numbers, refuse, typed, whole_number
from .checkpoint_file import Checkpoint
from .imported import Imported
from .naming import Parts, Source, convert

NAME = "guided-diffusion and improved-diffusion"
FLAGS: dict[str, str] = {}
HUB_FILES: tuple[str, ...] = ()  # read from a local .pt file only
# Flags that do not change the model, only its training, its sampling, or how it is computed.
_WITHOUT_EFFECT = {"use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "timestep_respacing"}
_DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "dropout": 0.0,
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "conv_resample": True,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "sigma_small": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": False,
}
_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the path is a PyTorch checkpoint: a file that ends in .pt or .pth."""
    return checkpoint.path.is_file() and checkpoint.path.suffix in (".pt", ".pth")


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """A checkpoint's UNet in float32 on the CPU, its noise schedule, and the conventions of its training.

    flags: those of guided-diffusion's scripts and of its UNetModel, by name, as Python values
    (class_cond=True; channel_mult=(1, 2, 2) or "1,2,2"). Those that are left out have guided-diffusion's
    defaults; improved-diffusion's scripts have another one for rescale_timesteps, which is True there.
    Channels and number of classes are read from the tensors. The model has no null label.

    The conventions are "prediction_type" ("epsilon" or "sample"), "variance" ("fixed_small", "fixed_large" or
    "learned_range") and "clip" (1.0). ValueError, in one line: a file that is missing, damaged, or does not
    agree with the flags; a flag that is unknown or cannot be represented.
    """
    known_names("flag", flags.keys() - _WITHOUT_EFFECT, sorted(_DEFAULTS))
    given = {flag: _checked(flag, flags[flag], _DEFAULTS[flag]) for flag in flags.keys() & _DEFAULTS.keys()}
    path, options = checkpoint.path, _DEFAULTS | given
    schedule = _schedule(options)
    tensors = read_torch(path)
    config = _config(options, tensors, path)
    with torch.device("meta"):  # no memory until the weights are known to fit
        unet = UNet(config)
    weights = convert_weights(config, tensors, options["use_new_attention_order"], str(path))
    load_weights(unet, weights, path)
    fixed = "fixed_small" if options["sigma_small"] else "fixed_large"
    conventions = {
        "prediction_type": "sample" if options["predict_xstart"] else "epsilon",
        "variance": "learned_range" if options["learn_sigma"] else fixed,
        "clip": 1.0,
    }
    return Imported(unet, schedule, conventions, {k: v for k, v in _DEFAULTS.items() if k not in given})


def _checked(flag: str, value: Any, default: Any) -> Any:
    """The value in the type of the default; a list of numbers may be text, a sequence or one number."""
    if not isinstance(default, str):
        return typed(f"flag {flag}", value, type(default))
    if type(value) is int:  # as the command line reads attention_resolutions=16
        return str(value)
    if not isinstance(value, str | list | tuple):
        refuse(f"flag {flag}", f"like {default!r}", value)
    return value


def _schedule(options: dict[str, Any]) -> NoiseSchedule:
    T = whole_number("flag diffusion_steps", options["diffusion_steps"], 1, MAX_TIMESTEPS)
    if choice("noise_schedule", options["noise_schedule"], ("linear", "cosine")) == "cosine":
        return NoiseSchedule.cosine(T)
    # Ho et al.'s betas for 1000 steps, stretched so that any number of steps ends at the same noise.
    return NoiseSchedule.linear(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)


def _config(options: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path) -> UNetConfig:
    size, heads = options["image_size"], options["num_heads"]
    if options["num_heads_upsample"] not in (-1, heads) and options["num_head_channels"] == -1:
        raise ValueError("num_heads_upsample cannot be imported, unless it is num_heads")
    first, label = tensors.get("input_blocks.0.0.weight"), tensors.get("label_emb.weight")
    if first is None or first.ndim != 4:
        raise ValueError(f"{path} holds no UNet of guided-diffusion: no input_blocks.0.0.weight")
    if (label is not None) != options["class_cond"]:
        found = "no label_emb" if label is None else "a label_emb"
        raise ValueError(f"{path} has {found}, but class_cond is {options['class_cond']}")
    mults = _numbers("channel_mult", options["channel_mult"]) or _CHANNEL_MULT.get(size)
    if not mults:
        raise ValueError(f"channel_mult must be given for an image_size of {size}")
    factors = [
        size // max(1, int(n)) for n in _numbers("attention_resolutions", options["attention_resolutions"])
    ]
    how = "resblock" if options["resblock_updown"] else "conv" if options["conv_resample"] else "plain"
    in_channels = first.shape[1]
    return UNetConfig(
        sample_size=size,
        in_channels=in_channels,
        out_channels=in_channels * (2 if options["learn_sigma"] else 1),
        channels=options["num_channels"],
        channel_mult=mults,
        num_res_blocks=options["num_res_blocks"],
        attention_levels=tuple(level for level in range(len(mults)) if 2**level in factors),
        num_heads=heads,
        head_channels=None if options["num_head_channels"] == -1 else options["num_head_channels"],
        scale_shift=options["use_scale_shift_norm"],
        flip_sin_to_cos=True,
        freq_shift=0,
        timestep_scale=1000 / options["diffusion_steps"] if options["rescale_timesteps"] else 1,
        downsample=how,
        upsample=how,
        downsample_padding="symmetric",
        norm_groups=32,
        norm_eps=1e-5,
        dropout=options["dropout"],
        num_classes=None if label is None else label.shape[0],
        has_null_label=False,
    )


def _numbers(name: str, value: str | Sequence[int | float]) -> tuple[int | float, ...]:
    try:
        items = [float(item) for item in value.split(",") if item] if isinstance(value, str) else list(value)
    except ValueError:
        refuse(name, "numbers, or text such as '1,2,4'", value)
    found = numbers(name, items).tolist()
    return tuple(int(item) if item == int(item) else item for item in found)


def convert_weights(
    config: UNetConfig,
    tensors: dict[str, torch.Tensor],
    new_attention_order: bool = False,
    origin: str = "the state dict",
) -> dict[str, torch.Tensor]:
    """The state dict of the package's UNet from that of an improved- or guided-diffusion UNetModel.

    new_attention_order: the flag use_new_attention_order. origin: the name of the state dict in messages.
    """
    parts = Parts(
        [
            ("time_mlp.0", "time_embed.0"),
            ("time_mlp.2", "time_embed.2"),
            ("input_conv", "input_blocks.0.0"),
            ("output_norm", "out.0"),
            ("output_conv", "out.2"),
        ],
        [],
        [],
    )
    if config.num_classes is not None:
        parts.plain.append(("label_embedding", "label_emb"))

    def block(level: str, i: int, attends: bool, foreign: str) -> None:
        parts.residual.append((f"{level}.blocks.{i}", f"{foreign}.0"))
        if attends:
            parts.attention.append((f"{level}.attentions.{i}", f"{foreign}.1"))

    def resample(level: str, how: str, foreign: str, conv: str) -> None:
        if how == "resblock":
            parts.residual.append((f"{level}.resample", foreign))
        elif how == "conv":
            parts.plain.append((f"{level}.resample.conv", f"{foreign}.{conv}"))

    n = 1
    for level, how in enumerate(config.level_downsample):
        for i in range(config.level_blocks[level]):
            block(f"down.{level}", i, level in config.attention_levels, f"input_blocks.{n}")
            n += 1
        if how is not None:
            resample(f"down.{level}", how, f"input_blocks.{n}.0", "op")
            n += 1
    parts.residual.append(("mid.blocks.0", "middle_block.0"))
    parts.residual.append(("mid.blocks.1", "middle_block.2"))
    parts.attention.append(("mid.attention", "middle_block.1"))
    n = 0
    for level, how in reversed(list(enumerate(config.level_upsample))):
        attends = level in config.attention_levels
        for i in range(config.level_blocks[level] + 1):
            block(f"up.{level}", i, attends, f"output_blocks.{n}")
            n += 1
        if how is not None:
            resample(f"up.{level}", how, f"output_blocks.{n - 1}.{2 if attends else 1}", "conv")
    names = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    }

    def take_attention(source: Source, foreign: str) -> dict[str, torch.Tensor]:
        ours = {}
        for kind in ("weight", "bias"):
            qkv = source.take(f"{foreign}.qkv.{kind}").flatten(1 if kind == "weight" else 0)
            if not new_attention_order:  # rows by head, then q, k, v; the package has q, k, v first
                heads = config.num_heads
                if config.head_channels is not None:
                    heads = len(qkv) // (3 * config.head_channels)
                if heads == 0 or len(qkv) % (3 * heads):
                    raise ValueError(f"{origin}: {foreign}.qkv cannot be divided into {heads} heads")
                qkv = qkv.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            ours[f"qkv.{kind}"] = qkv
            proj = source.take(f"{foreign}.proj_out.{kind}")
            ours[f"proj.{kind}"] = proj.flatten(1) if kind == "weight" else proj
            ours[f"norm.{kind}"] = source.take(f"{foreign}.norm.{kind}")
        return ours

    return convert(Source(tensors, origin), parts, names, "emb_layers.1", take_attention)
