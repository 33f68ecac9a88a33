"""Reads the .pt checkpoints of OpenAI's guided-diffusion; `improved_diffusion` reads those of its parent.

Such a file holds tensors only. Users of those projects describe the model by flags on the command line, and
`load` takes the same flags. Those that the tensors tell may be left out, and must not contradict them.
"""

from collections.abc import Sequence
from typing import Any

from ..models.registry import build_on_meta
from ..models.unet import UNetConfig
from ..process.schedule import MAX_TIMESTEPS, NoiseSchedule
from ..storage.reading import load_weights
from ..utils.validation import choice, known_names, numbers, refuse, shown, typed, whole_number
from .checkpoint_file import Checkpoint
from .imported import Imported
from .openai_unet import MARKS, Architecture, convert_weights, read_architecture

NAME = "guided-diffusion"
HUB_FILES: tuple[str, ...] = ()  # read from a local .pt file only
# Flags that the tensors do not tell, and their values where nobody gives them.
DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "use_new_attention_order": False,
    "dropout": 0.0,
    "sigma_small": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": False,
}
# Flags of sampling, which are not facts about the model, with the defaults of image_sample.py.
_SAMPLING: dict[str, Any] = {"timestep_respacing": "", "use_ddim": False, "clip_denoised": True}
_TOLD: dict[str, type] = {
    "num_channels": int,
    "num_res_blocks": int,
    "channel_mult": str,
    "attention_resolutions": str,
    "class_cond": bool,
    "use_scale_shift_norm": bool,
    "resblock_updown": bool,
    "conv_resample": bool,
    "learn_sigma": bool,
}
# Flags that change only the training, or how the same numbers are computed.
_WITHOUT_EFFECT = ("use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas")
FLAGS = {
    "image_size": "height and width of the images",
    "num_heads": "number of attention heads",
    "num_heads_upsample": "number of attention heads on the way up; -1 for num_heads",
    "num_head_channels": "width of each attention head, in place of num_heads; -1 for num_heads",
    "use_new_attention_order": "q, k and v are divided before the heads",
    "dropout": "probability of dropout in training",
    "sigma_small": "the fixed variance of a step is that of the posterior, not beta",
    "diffusion_steps": "number of timesteps",
    "noise_schedule": "linear or cosine",
    "predict_xstart": "the network predicts the image, not the noise",
    "rescale_timesteps": "timesteps are scaled to 0..1000 for the network",
    "timestep_respacing": "steps of the model's own sampler, such as 250, ddim25 or 10,15,20",
    "use_ddim": "the model's own sampler is DDIM",
    "clip_denoised": "False leaves predicted images unclipped",
}
FLAGS |= {flag: "told by the checkpoint; must not contradict it" for flag in _TOLD}
FLAGS |= {flag: "has no effect on the imported model" for flag in _WITHOUT_EFFECT}
# Image size, by the default channel_mult of the projects.
_SIZES = {
    (0.5, 1, 1, 2, 2, 4, 4): 512,
    (1, 1, 2, 2, 4, 4): 256,
    (1, 1, 2, 3, 4): 128,
    (1, 2, 3, 4): 64,
    (1, 2, 2, 2): 32,
}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether the file holds a UNet with the names of guided-diffusion, which improved-diffusion has, too."""
    return all(name in checkpoint.tensors for name in MARKS)


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """`load_unet` with the defaults of guided-diffusion.

    "format" is among the assumed flags unless the tensors tell that the model is not improved-diffusion's.
    """
    imported = load_unet(checkpoint, flags, DEFAULTS)
    if read_architecture(checkpoint.tensors, str(checkpoint)).resblock_updown:
        return imported
    return imported._replace(assumed={"format": NAME, **(imported.assumed or {})})


def load_unet(checkpoint: Checkpoint, flags: dict[str, Any], defaults: dict[str, Any]) -> Imported:
    """A checkpoint's UNet in float32 on the CPU, its noise schedule, and the process of image_sample.py.

    flags: see `FLAGS`, as Python values (class_cond=True; channel_mult=(1, 2, 2) or "1,2,2"). defaults: the
    values of those that the tensors do not tell. The model has no null label.

    The model's own sampler is ancestral with all steps, unless timestep_respacing and use_ddim say otherwise;
    "ddpm" visits the timesteps of timestep_respacing "N", and "ddim" those of "ddimN", for N steps.

    ValueError, in one line: a file that is damaged or of another model, or does not agree with the flags; a
    flag that is unknown or cannot be represented.
    """
    known_names("flag", flags, FLAGS)
    given = {flag: _checked(flag, value, defaults | _SAMPLING) for flag, value in flags.items()}
    tensors, origin = checkpoint.tensors, str(checkpoint)
    found = read_architecture(tensors, origin)
    assumed = defaults | {"image_size": _image_size(found, given, defaults["image_size"])}
    if found.learn_sigma:
        del assumed["sigma_small"]
    options = _SAMPLING | assumed | given
    _check_told(found, given, options, origin)
    schedule, config = _schedule(options), _config(found, options)
    unet = build_on_meta(config)  # first: it refuses heads into which the weights cannot be divided
    weights = convert_weights(config, tensors, options["use_new_attention_order"], origin)
    load_weights(unet, weights, checkpoint.path)
    conventions = _conventions(options, found.learn_sigma, schedule.T)
    return Imported(unet, schedule, conventions, {k: v for k, v in assumed.items() if k not in given})


def _checked(flag: str, value: Any, defaults: dict[str, Any]) -> Any:
    """The value in the type of the flag; a list of numbers may be text, a sequence or one number."""
    if flag in _WITHOUT_EFFECT:
        return value
    kind = _TOLD[flag] if flag in _TOLD else type(defaults[flag])
    if kind is not str:
        return typed(f"flag {flag}", value, kind)
    if type(value) is int:  # as the command line reads attention_resolutions=16
        return str(value)
    if not isinstance(value, str | list | tuple):
        refuse(f"flag {flag}", "text or a list of numbers", value)
    return value


def _image_size(found: Architecture, given: dict[str, Any], default: int) -> int:
    """The image size that the tensors suggest.

    That of a default channel_mult; else one whose attention is where the tensors have it, for the given or
    default attention_resolutions; else `default`.
    """
    if found.channel_mult in _SIZES:
        return _SIZES[found.channel_mult]
    resolutions = _resolutions(given.get("attention_resolutions", "16,8"))
    sizes = [n << level for level in found.attention_levels for n in resolutions]
    halved = len(found.channel_mult) - 1
    fitting = (
        n for n in sizes if _levels(found, n, resolutions) == found.attention_levels and n % 2**halved == 0
    )
    return max(fitting, default=default)


def _resolutions(value: str | Sequence[int | float]) -> list[int]:
    return [max(1, int(n)) for n in _numbers("attention_resolutions", value)]


def _levels(found: Architecture, size: int, resolutions: list[int]) -> tuple[int, ...]:
    """The levels with attention at these resolutions, as the projects compute them."""
    factors = {size // n for n in resolutions}
    return tuple(level for level in range(len(found.channel_mult)) if 2**level in factors)


def _check_told(found: Architecture, given: dict[str, Any], options: dict[str, Any], origin: str) -> None:
    """ValueError if a flag that was given says otherwise than the tensors."""
    told = found._asdict() | {"class_cond": found.num_classes is not None}
    if found.resblock_updown:
        told["conv_resample"] = given.get("conv_resample")  # without effect
    for flag in given.keys() & _TOLD.keys():
        said, has = given[flag], told.get(flag)
        if flag == "channel_mult":
            said = _numbers(flag, said) or found.channel_mult
        elif flag == "attention_resolutions":
            levels = _levels(found, options["image_size"], _resolutions(said))
            said, has = (
                (said, said)
                if levels == found.attention_levels
                else (said, _told_resolutions(found, options))
            )
        if said != has:
            raise ValueError(f"{origin} has {flag} {shown(has)}, but the flag is {shown(given[flag])}")


def _told_resolutions(found: Architecture, options: dict[str, Any]) -> str:
    sizes = [options["image_size"] >> level for level in found.attention_levels]
    return ",".join(map(str, sizes)) or "of no level"


def _schedule(options: dict[str, Any]) -> NoiseSchedule:
    T = whole_number("flag diffusion_steps", options["diffusion_steps"], 1, MAX_TIMESTEPS)
    if choice("noise_schedule", options["noise_schedule"], ("linear", "cosine")) == "cosine":
        return NoiseSchedule.cosine(T)
    # Ho et al.'s betas for 1000 steps, stretched so that any number of steps ends at the same noise.
    return NoiseSchedule.linear(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)


def _config(found: Architecture, options: dict[str, Any]) -> UNetConfig:
    heads, width = options["num_heads"], options["num_head_channels"]
    if options["num_heads_upsample"] not in (-1, heads) and width == -1:
        raise ValueError("num_heads_upsample cannot be imported, unless it is num_heads")
    how = "resblock" if found.resblock_updown else "conv" if found.conv_resample else "plain"
    return UNetConfig(
        sample_size=options["image_size"],
        in_channels=found.in_channels,
        out_channels=found.in_channels * (2 if found.learn_sigma else 1),
        channels=found.num_channels,
        channel_mult=found.channel_mult,
        num_res_blocks=found.num_res_blocks,
        attention_levels=found.attention_levels,
        num_heads=heads,
        head_channels=None if width == -1 else width,
        scale_shift=found.use_scale_shift_norm,
        flip_sin_to_cos=True,
        freq_shift=0,
        timestep_scale=1000 / options["diffusion_steps"] if options["rescale_timesteps"] else 1,
        downsample=how,
        upsample=how,
        downsample_padding="symmetric",
        norm_groups=32,
        norm_eps=1e-5,
        dropout=options["dropout"],
        num_classes=found.num_classes,
        has_null_label=False,
    )


def _conventions(options: dict[str, Any], learn_sigma: bool, T: int) -> dict[str, Any]:
    """The arguments of `DDPM`."""
    fixed = "fixed_small" if options.get("sigma_small") else "fixed_large"
    name = "ddim" if options["use_ddim"] else "ddpm"
    return {
        "prediction_type": "sample" if options["predict_xstart"] else "epsilon",
        "variance": "learned_range" if learn_sigma else fixed,
        "clip": 1.0 if options["clip_denoised"] else None,
        "sampler": {"name": name, **_respacing(options["timestep_respacing"], T)},
        "sampler_options": {
            "ddpm": {"spacing": "respaced"},
            "ddim": {"spacing": "stride", "use_clipped_model_output": True},
        },
    }


def _respacing(value: str | Sequence[int], T: int) -> dict[str, Any]:
    """The steps and the spacing of the flag timestep_respacing."""
    text = value if isinstance(value, str) else ",".join(map(str, value))
    stride = text.removeprefix("ddim")
    counts = stride.split(",") if text else [str(T)]
    if not all(count.isdecimal() for count in counts) or (stride != text and len(counts) > 1):
        refuse("flag timestep_respacing", "like '250', 'ddim25' or '10,15,20'", value)
    steps = whole_number("flag timestep_respacing", sum(map(int, counts)), 1, T)
    return {
        "steps": steps,
        "spacing": "stride" if stride != text else text if len(counts) > 1 else "respaced",
    }


def _numbers(name: str, value: str | Sequence[int | float]) -> tuple[int | float, ...]:
    try:
        items = [float(item) for item in value.split(",") if item] if isinstance(value, str) else list(value)
    except ValueError:
        refuse(name, "numbers, or text such as '1,2,4'", value)
    found = numbers(name, items).tolist()
    return tuple(int(item) if item == int(item) else item for item in found)
