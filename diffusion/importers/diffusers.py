"""Reads the folders of diffusers: pipelines of a UNet2DModel and a scheduler."""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..models.config import MAX_CHANNELS
from ..models.unet import UNet, UNetConfig
from ..process.prediction import PREDICTION_TYPES
from ..process.schedule import NoiseSchedule
from ..storage.reading import load_weights, read_json, read_safetensors, read_torch
from ..utils.validation import number, refuse, shown, whole_numbers
from .checkpoint_file import Checkpoint
from .imported import Imported
from .naming import Parts, Source, convert

NAME = "diffusers"
HUB_FILES: tuple[str, ...] = ("*.json", "*.safetensors", "*.bin")
FLAGS: dict[str, str] = {}
T = TypeVar("T")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# Values of the options that a UNet2DModel's configuration does not mention.
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # only a learned time embedding uses it
}
# Options of which the package's UNet supports only these values; the first is the default.
_FIXED = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
}
_RESAMPLING = {"conv": "conv", "resnet": "resblock", None: "conv"}
# scheduler class -> whether it clips predictions by default
_SCHEDULERS = {"DDPMScheduler": True, "DDIMScheduler": True, "DPMSolverMultistepScheduler": False}
# names within a residual block: the package's -> diffusers'
RESIDUAL_NAMES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
_BETA_SCHEDULES = ("linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2")
_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned_range": "learned_range",
    None: "fixed_small",
}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the folder looks like one of diffusers: a pipeline, or a model alone."""
    folder = checkpoint.path
    if os.path.isfile(folder / "model_index.json"):
        return True
    try:
        return "_class_name" in read_json(folder / "config.json")
    except ValueError:
        return False


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """A pipeline's UNet in float32 on the CPU, its noise schedule, and the conventions of its training.

    checkpoint: a folder with `unet/` and `scheduler/`, or the files of both side by side. The conventions are
    "prediction_type" ("epsilon", "sample" or "v_prediction"), "variance" ("fixed_small", "fixed_large" or
    "learned_range") and "clip" (the largest absolute value of a predicted image, or None). ValueError, in one
    line: a file that is missing or damaged, an option that cannot be represented, or any
    flag (the configuration files are complete).
    """
    folder = checkpoint.path
    if flags:
        raise ValueError(f"{folder} takes no flag {min(flags)}: diffusers' folders say how they were trained")
    path = _part(folder, "scheduler") / "scheduler_config.json"
    if not os.path.lexists(path):
        raise ValueError(f"{path} is missing; without it the noise schedule is unknown")
    schedule, conventions = _located(path, read_scheduler, read_json(path))
    unet = load_unet(_part(folder, "unet"))
    if unet.config.learned_variance != (conventions["variance"] == "learned_range"):
        raise ValueError(
            f"{path}: a variance of type {conventions['variance']!r} does not go with a UNet of "
            f"{unet.config.in_channels} channels in and {unet.config.out_channels} out"
        )
    return Imported(unet, schedule, conventions)


def load_unet(folder: str | os.PathLike) -> UNet:
    """A UNet2DModel from `config.json` and its weights, safetensors or .bin, in float32 on the CPU.

    ValueError, in one line: a file that is missing or damaged, or an option that cannot be represented.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = _located(path, unet_config, read_json(path))
    weights = next((folder / name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if weights is None:
        raise ValueError(f"{folder} has none of {', '.join(WEIGHTS)}")
    tensors = read_torch(weights) if weights.suffix == ".bin" else read_safetensors(weights)
    with torch.device("meta"):  # no memory until the weights are known to fit
        unet = _located(path, UNet, config)
    load_weights(unet, convert_weights(config, tensors, str(weights)), weights)
    return unet


def _part(folder: Path, name: str) -> Path:
    return folder / name if os.path.isdir(folder / name) else folder


def _located(path: Path, function: Callable[..., T], *args: Any) -> T:
    """function(*args), whose errors get the name of the file."""
    try:
        return function(*args)
    except (TypeError, ValueError) as error:  # TypeError: a list where JSON should hold a string
        raise ValueError(f"{path}: {error}") from error


def _known(name: str, value: Any, known: Collection) -> Any:
    """The value if it is one of `known`, type included: JSON may hold any type. ValueError otherwise."""
    if not any(type(value) is type(option) and value == option for option in known):
        only = ", ".join(repr(option) for option in known if option is not None)
        raise ValueError(f"{name} {shown(value)} cannot be imported, only {only or None}")
    return value


def unet_config(config: dict[str, Any]) -> UNetConfig:
    """The UNetConfig of a UNet2DModel's configuration; ValueError naming an option that it cannot hold."""
    _known("_class_name", config.get("_class_name", "UNet2DModel"), ["UNet2DModel"])
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, values in _FIXED.items():
        _known(key, given.pop(key, values[0]), values)
    unknown = sorted(given.keys() - _DEFAULTS.keys())
    if unknown:
        raise ValueError(f"UNet2DModel's option {unknown[0]!r} is not known")
    options = _DEFAULTS | given
    widths = whole_numbers("block_out_channels", options["block_out_channels"], 1, MAX_CHANNELS).tolist()
    if not widths:
        refuse("block_out_channels", "a width for each level", widths)
    if options["sample_size"] is None:
        raise ValueError("sample_size must be given, an integer or [height, width]")
    down = _levels("down_block_types", "Down", options, len(widths))
    up = _levels("up_block_types", "Up", options, len(widths))[::-1]
    if [attends for attends, _ in down] != [attends for attends, _ in up]:
        raise ValueError("up_block_types cannot be imported: attention is not where down_block_types have it")
    _known("resnet_time_scale_shift", options["resnet_time_scale_shift"], ("default", "scale_shift"))
    _known("downsample_padding", options["downsample_padding"], (0, 1))
    scale_shift = options["resnet_time_scale_shift"] == "scale_shift"
    mid_groups = options["attn_norm_num_groups"]
    return UNetConfig(
        sample_size=options["sample_size"],
        in_channels=options["in_channels"],
        out_channels=options["out_channels"],
        channels=widths[0],
        channel_mult=tuple(width / widths[0] for width in widths),
        num_res_blocks=options["layers_per_block"],
        attention_levels=tuple(level for level, (attends, _) in enumerate(down) if attends),
        mid_attention=options["add_attention"],
        mid_attention_groups=0 if mid_groups is None and scale_shift else mid_groups,
        head_channels=options["attention_head_dim"],
        time_embed_dim=options["time_embedding_dim"],
        scale_shift=scale_shift,
        flip_sin_to_cos=options["flip_sin_to_cos"],
        freq_shift=options["freq_shift"],
        downsample=tuple(how for _, how in down[:-1]),
        upsample=tuple(how for _, how in up[1:]),
        downsample_padding="symmetric" if options["downsample_padding"] else "asymmetric",
        norm_groups=options["norm_num_groups"],
        norm_eps=options["norm_eps"],
        dropout=options["dropout"],
        num_classes=options["num_class_embeds"],
        has_null_label=False,
    )


def _levels(key: str, way: str, options: dict[str, Any], count: int) -> list[tuple[bool, str]]:
    """Whether each block has attention, and the kind of its change of resolution."""
    names = options[key]
    if not isinstance(names, list) or len(names) != count:
        raise ValueError(f"{key} must name {count} blocks, one for each of block_out_channels")
    resampling = options[f"{way.lower()}sample_type"]
    _known(f"{way.lower()}sample_type", resampling, _RESAMPLING)
    blocks = {
        f"{way}Block2D": (False, "conv"),
        f"Attn{way}Block2D": (True, _RESAMPLING[resampling]),
        f"Resnet{way}sampleBlock2D": (False, "resblock"),
    }
    for name in names:
        _known(key, name, blocks)
    return [blocks[name] for name in names]


def convert_weights(
    config: UNetConfig, tensors: dict[str, torch.Tensor], origin: str = "the state dict"
) -> dict[str, torch.Tensor]:
    """The state dict of the package's UNet from that of a UNet2DModel. origin: its name in messages."""
    source = Source(tensors, origin)
    return convert(source, parts_of(config), RESIDUAL_NAMES, "time_emb_proj", _take_attention)


def parts_of(config: UNetConfig) -> Parts:
    """The names of the package's UNet of this configuration and those of its UNet2DModel."""
    parts = Parts(
        [
            ("time_mlp.0", "time_embedding.linear_1"),
            ("time_mlp.2", "time_embedding.linear_2"),
            ("input_conv", "conv_in"),
            ("output_norm", "conv_norm_out"),
            ("output_conv", "conv_out"),
        ],
        [],
        [],
    )
    if config.num_classes is not None:
        parts.plain.append(("label_embedding", "class_embedding"))

    def level(name: str, foreign: str, index: int, blocks: int, how: str | None, resampler: str) -> None:
        for i in range(blocks):
            parts.residual.append((f"{name}.blocks.{i}", f"{foreign}.resnets.{i}"))
            if index in config.attention_levels:
                parts.attention.append((f"{name}.attentions.{i}", f"{foreign}.attentions.{i}"))
        if how == "resblock":
            parts.residual.append((f"{name}.resample", f"{foreign}.{resampler}.0"))
        elif how == "conv":
            parts.plain.append((f"{name}.resample.conv", f"{foreign}.{resampler}.0.conv"))

    blocks, levels = config.level_blocks, len(config.channel_mult)
    for i, how in enumerate(config.level_downsample):
        level(f"down.{i}", f"down_blocks.{i}", i, blocks[i], how, "downsamplers")
    parts.residual.append(("mid.blocks.0", "mid_block.resnets.0"))
    parts.residual.append(("mid.blocks.1", "mid_block.resnets.1"))
    if config.mid_attention:
        parts.attention.append(("mid.attention", "mid_block.attentions.0"))
    for i, how in reversed(list(enumerate(config.level_upsample))):
        level(f"up.{i}", f"up_blocks.{levels - 1 - i}", i, blocks[i] + 1, how, "upsamplers")
    return parts


def _take_attention(source: Source, foreign: str) -> dict[str, torch.Tensor]:
    old = f"{foreign}.query.weight" in source  # names before diffusers 0.13
    names = ("query", "key", "value") if old else ("to_q", "to_k", "to_v")
    proj = "proj_attn" if old else "to_out.0"
    ours = {}
    for kind in ("weight", "bias"):
        ours[f"qkv.{kind}"] = torch.cat([source.take(f"{foreign}.{name}.{kind}") for name in names])
        ours[f"proj.{kind}"] = source.take(f"{foreign}.{proj}.{kind}")
        if f"{foreign}.group_norm.{kind}" in source:
            ours[f"norm.{kind}"] = source.take(f"{foreign}.group_norm.{kind}")
    return {
        name: t.reshape(t.shape[:2]) if name.endswith("weight") and t.ndim > 2 else t
        for name, t in ours.items()
    }


def read_scheduler(config: dict[str, Any]) -> tuple[NoiseSchedule, dict[str, Any]]:
    """The noise schedule and conventions of a scheduler's configuration; see `load`.

    ValueError naming the option that cannot be represented. The spacing of timesteps is ignored: it is an
    option of sampling, not of the model.
    """
    name = _known("_class_name", config.get("_class_name"), _SCHEDULERS)
    prediction = config.get("prediction_type", "epsilon" if config.get("predict_epsilon", True) else "sample")
    _known("prediction_type", prediction, PREDICTION_TYPES)
    variance = config.get("variance_type")
    _known("variance_type", variance, _VARIANCES)
    if config.get("thresholding"):
        raise ValueError("thresholding cannot be imported: it is an option of sampling, dynamic_threshold")
    clips = config.get("clip_sample", _SCHEDULERS[name])
    clip = config.get("clip_sample_range", 1.0) if clips else None
    clip = None if clip is None else number("clip_sample_range", clip, above=0)
    conventions = {"prediction_type": prediction, "variance": _VARIANCES[variance], "clip": clip}
    return _schedule(config), conventions


def _schedule(config: dict[str, Any]) -> NoiseSchedule:
    T, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    ends = {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    if config.get("trained_betas") is not None:
        schedule = NoiseSchedule.from_betas(config["trained_betas"])
    elif _known("beta_schedule", kind, _BETA_SCHEDULES) == "squaredcos_cap_v2":
        schedule = NoiseSchedule.cosine(T)
    else:
        schedule = NoiseSchedule.from_config({"kind": kind, "T": T, **ends})
    return schedule.rescale_zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule
