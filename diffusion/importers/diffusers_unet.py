"""diffusers' UNet2DModel as the package's UNet: its configuration and its weights."""

from collections.abc import Collection
from typing import Any

import torch

from ..models.network import MAX_CHANNELS
from ..models.unet import UNetConfig
from ..utils.validation import number, refuse, shown, switch, whole_number, whole_numbers
from .naming import Parts, Source, convert

# Names within a residual block: the package's -> diffusers'.
RESIDUAL_NAMES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
MAX_LABELS = 2**31 - 1
ASSUMED_CLASSES = 1000  # of a UNet2DModel whose labels are embedded as timesteps are

# Values of the options that a UNet2DModel's configuration does not mention.
_DEFAULTS = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "class_embed_type": None,
    "num_class_embeds": None,
    "num_train_timesteps": None,  # only a learned time embedding uses it
}
# Fields that EMAModel adds to the configuration of the model that it averages.
_OF_AVERAGES = {
    "decay",
    "inv_gamma",
    "min_decay",
    "optimization_step",
    "power",
    "update_after_step",
    "use_ema_warmup",
}
_RESAMPLING = {"conv": "conv", "resnet": "resblock", None: "conv"}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "mish": "mish", "relu": "relu"}
_TIME_EMBEDDINGS = {"positional": "sinusoidal", "fourier": "fourier", "learned": "learned"}
_LABEL_EMBEDDINGS = {None: "table", "timestep": "timestep", "identity": "identity"}


def known(name: str, value: Any, options: Collection) -> Any:
    """The value if it is one of `options`, type included: JSON may hold any type. ValueError otherwise."""
    if not any(type(value) is type(option) and value == option for option in options):
        only = ", ".join(repr(option) for option in options if option is not None)
        raise ValueError(f"{name} {shown(value)} cannot be imported, only {only or None}")
    return value


def unet_config(
    config: dict[str, Any],
    *,
    size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    null_label: int | None = None,
) -> UNetConfig:
    """The UNetConfig of a UNet2DModel's configuration; ValueError naming an option that it cannot hold.

    size: height and width of the images, instead of sample_size. num_classes: number of the labels of a
    class_embed_type "timestep", ASSUMED_CLASSES by default. null_label: the label of no class, one of
    num_class_embeds, which the package's UNet has as its last.
    """
    known("_class_name", config.get("_class_name", "UNet2DModel"), ["UNet2DModel"])
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(given.keys() - _DEFAULTS.keys() - _OF_AVERAGES)
    if unknown:
        raise ValueError(f"UNet2DModel's option {unknown[0]!r} is not known")
    options = _DEFAULTS | given
    widths = whole_numbers("block_out_channels", options["block_out_channels"], 1, MAX_CHANNELS).tolist()
    if not widths:
        refuse("block_out_channels", "a width for each level", widths)
    size = options["sample_size"] if size is None else size
    if size is None:
        raise ValueError(
            "sample_size must be given, an integer or [height, width]; "
            "give the flag size (--size), such as 32 or 32x48"
        )
    _check_channels(options["in_channels"], options["out_channels"])
    down = _levels("down_block_types", "Down", options, len(widths))
    up = _levels("up_block_types", "Up", options, len(widths))[::-1]
    attention, up_attention = (
        tuple(level for level, (attends, _) in enumerate(way) if attends) for way in (down, up)
    )
    known("resnet_time_scale_shift", options["resnet_time_scale_shift"], ("default", "scale_shift"))
    known("downsample_padding", options["downsample_padding"], (0, 1))
    known("mid_block_type", options["mid_block_type"], ("UNetMidBlock2D", None))
    activation = options["act_fn"]
    activation = activation.lower() if isinstance(activation, str) else activation
    scale_shift = options["resnet_time_scale_shift"] == "scale_shift"
    mid_groups, head = options["attn_norm_num_groups"], options["attention_head_dim"]
    time = _TIME_EMBEDDINGS[known("time_embedding_type", options["time_embedding_type"], _TIME_EMBEDDINGS)]
    classes, has_null_label = _classes(options, num_classes, null_label)
    return UNetConfig(
        sample_size=size,
        in_channels=options["in_channels"],
        out_channels=options["out_channels"],
        channels=widths[0],
        channel_mult=tuple(width / widths[0] for width in widths),
        num_res_blocks=options["layers_per_block"],
        attention_levels=attention,
        up_attention_levels=None if attention == up_attention else up_attention,
        mid_attention=options["add_attention"],
        mid_attention_groups=0 if mid_groups is None and scale_shift else mid_groups,
        has_middle=options["mid_block_type"] is not None,
        mid_divisor=number("mid_block_scale_factor", options["mid_block_scale_factor"], above=0),
        head_channels=head,
        narrow_attention=isinstance(head, int) and head > 0 and any(width % head for width in widths),
        activation=_ACTIVATIONS[known("act_fn", activation, _ACTIVATIONS)],
        center_input=switch("center_input_sample", options["center_input_sample"]),
        time_embedding=time,
        time_embed_dim=options["time_embedding_dim"],
        learned_timesteps=options["num_train_timesteps"] if time == "learned" else None,
        scale_shift=scale_shift,
        flip_sin_to_cos=options["flip_sin_to_cos"],
        freq_shift=options["freq_shift"],
        downsample=tuple(how for _, how in down[:-1]),
        upsample=tuple(how for _, how in up[1:]),
        downsample_padding="symmetric" if options["downsample_padding"] else "asymmetric",
        norm_groups=options["norm_num_groups"],
        norm_eps=options["norm_eps"],
        dropout=options["dropout"],
        num_classes=classes,
        has_null_label=has_null_label,
        label_embedding=_LABEL_EMBEDDINGS[options["class_embed_type"]],
    )


def _check_channels(channels: Any, outputs: Any) -> None:
    """ValueError unless the output is an image, or an image and its variance."""
    channels = whole_number("in_channels", channels, 1, MAX_CHANNELS)
    outputs = whole_number("out_channels", outputs, 1, MAX_CHANNELS)
    if outputs not in (channels, 2 * channels):
        raise ValueError(
            f"in_channels {channels} and out_channels {outputs} cannot be sampled: the output must have as "
            "many channels as the input, or twice as many for a learned variance"
        )


def _classes(options: dict[str, Any], count: int | None, null: int | None) -> tuple[int | None, bool]:
    """The fields num_classes and has_null_label of the UNetConfig."""
    kind, rows = options["class_embed_type"], options["num_class_embeds"]
    known("class_embed_type", kind, _LABEL_EMBEDDINGS)
    if kind is not None or rows is None:
        if null is not None:
            raise ValueError(f"null label {null} cannot be declared: the model has no table of labels")
        if kind != "timestep" and count is not None:
            raise ValueError(f"num_classes {count} cannot be declared: the model has no numbers as labels")
        classes = count if rows is None else count or whole_number("num_class_embeds", rows, 1, MAX_LABELS)
        return (classes or ASSUMED_CLASSES if kind == "timestep" else None), False
    rows = whole_number("num_class_embeds", rows, 1, MAX_LABELS)
    if count is not None:
        raise ValueError(f"num_classes {count} cannot be declared: the model's table has {rows} labels")
    if null is None:
        return rows, False
    if rows == 1:
        raise ValueError("null label 0 cannot be declared: the model has no other label")
    whole_number("the null label", null, 0, rows - 1)
    return rows - 1, True


def _levels(key: str, way: str, options: dict[str, Any], count: int) -> list[tuple[bool, str]]:
    """Whether each block has attention, and the kind of its change of resolution."""
    names = options[key]
    if not isinstance(names, list) or len(names) != count:
        raise ValueError(f"{key} must name {count} blocks, one for each of block_out_channels")
    resampling = options[f"{way.lower()}sample_type"]
    known(f"{way.lower()}sample_type", resampling, _RESAMPLING)
    blocks = {
        f"{way}Block2D": (False, "conv"),
        f"Attn{way}Block2D": (True, _RESAMPLING[resampling]),
        f"Resnet{way}sampleBlock2D": (False, "resblock"),
    }
    blocks |= {f"UNetRes{name}": kind for name, kind in blocks.items()}  # names of 2022
    for name in names:
        known(key, name, blocks)
    return [blocks[name] for name in names]


def convert_weights(
    config: UNetConfig,
    tensors: dict[str, torch.Tensor],
    origin: str = "the state dict",
    *,
    null_label: int | None = None,
) -> dict[str, torch.Tensor]:
    """The state dict of the package's UNet from that of a UNet2DModel.

    origin: its name in messages. null_label: as for `unet_config`; the labels after it move down by one.
    """
    source, parts = Source(tensors, origin), parts_of(config)
    ours = convert(source, parts, RESIDUAL_NAMES, "time_emb_proj", _take_attention)
    if null_label is not None:
        table = ours["label_embedding.weight"]
        ours["label_embedding.weight"] = torch.cat(
            [table[:null_label], table[null_label + 1 :], table[null_label : null_label + 1]]
        )
    return ours


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
    if config.time_embedding == "learned":
        parts.plain.append(("time_table", "time_proj"))
    elif config.time_embedding == "fourier":
        parts = parts._replace(tensors=(("time_frequencies", "time_proj.weight"),))
    if config.label_embedding == "timestep":
        parts.plain.append(("label_mlp.0", "class_embedding.linear_1"))
        parts.plain.append(("label_mlp.2", "class_embedding.linear_2"))
    elif config.num_classes is not None:
        parts.plain.append(("label_embedding", "class_embedding"))

    def level(name: str, foreign: str, attends: bool, blocks: int, how: str | None, resampler: str) -> None:
        for i in range(blocks):
            parts.residual.append((f"{name}.blocks.{i}", f"{foreign}.resnets.{i}"))
            if attends:
                parts.attention.append((f"{name}.attentions.{i}", f"{foreign}.attentions.{i}"))
        if how == "resblock":
            parts.residual.append((f"{name}.resample", f"{foreign}.{resampler}.0"))
        elif how == "conv":
            parts.plain.append((f"{name}.resample.conv", f"{foreign}.{resampler}.0.conv"))

    blocks, levels = config.level_blocks, len(config.channel_mult)
    for i, how in enumerate(config.level_downsample):
        attends = config.level_attention[i][0]
        level(f"down.{i}", f"down_blocks.{i}", attends, blocks[i], how, "downsamplers")
    if config.has_middle:
        parts.residual.append(("mid.blocks.0", "mid_block.resnets.0"))
        parts.residual.append(("mid.blocks.1", "mid_block.resnets.1"))
        if config.mid_attention:
            parts.attention.append(("mid.attention", "mid_block.attentions.0"))
    for i, how in reversed(list(enumerate(config.level_upsample))):
        foreign, attends = f"up_blocks.{levels - 1 - i}", config.level_attention[i][1]
        level(f"up.{i}", foreign, attends, blocks[i] + 1, how, "upsamplers")
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
