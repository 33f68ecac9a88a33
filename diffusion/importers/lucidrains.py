"""Reads the checkpoints of denoising-diffusion-pytorch (github.com/lucidrains/denoising-diffusion-pytorch).

They are milestones of its Trainer (`model-N.pt`), state dicts of its GaussianDiffusion, which hold the noise
schedule, and state dicts of its Unet alone. The classes of its `classifier_free_guidance` are read as well.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ..process.schedule import MAX_TIMESTEPS, NoiseSchedule
from ..storage.checkpoint import load_network
from ..utils.validation import choice, typed, whole_number
from .checkpoint_file import Checkpoint, without_prefixes
from .flags import Flags, image_size
from .imported import Imported
from .lucidrains_network import (
    Tensors,
    Version,
    check_kind,
    likely_version,
    network_config,
    network_weights,
    release,
)

NAME = "denoising-diffusion-pytorch"
HUB_FILES: tuple[str, ...] = ()  # read from a local file only
FLAGS = {
    "image_size": "height and width of the images, such as 32 or 32x48; also --size",
    "size": "the same",
    "milestone": "number of a milestone in a folder; by default the last",
    "ema": "False for the weights of a milestone instead of their moving average",
    "sampling_timesteps": "number of DDIM's steps; by default all timesteps by ancestral sampling",
    "ddim_sampling_eta": "eta of DDIM",
    "auto_normalize": "False for images that were diffused in [0, 1]",
    "objective": "pred_noise, pred_x0 or pred_v",
    "timesteps": "T, for a Unet alone",
    "beta_schedule": "linear, cosine or sigmoid, for a Unet alone",
    "attn_heads": "number of attention heads, for a Unet without memory tokens",
    "resnet_block_groups": "groups of the group normalisation",
    "sinusoidal_pos_emb_theta": "base of the frequencies of the time embedding",
    "dropout": "dropout in training",
    "cond_scale": "guidance scale, for a Unet with classes",
    "rescaled_phi": "guidance rescale, for a Unet with classes",
    "version": "release of denoising-diffusion-pytorch that trained the model",
}
_FIRST = "init_conv.weight"
_OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


def recognises(checkpoint: Checkpoint) -> bool:
    """Whether a file, or the last milestone in a folder, holds a UNet of this layout."""
    try:
        tensors = _stored(_file(checkpoint)).tensors
    except ValueError:
        return False
    names = [name.rpartition("downs.0.0.")[2] for name in tensors if "downs.0.0." in name]
    return any(name.startswith(("block1.", "ds_conv.")) for name in names)


def load(checkpoint: Checkpoint, /, **flags: Any) -> Imported:
    """A checkpoint's UNet in float32 on the CPU, its noise schedule, and the conventions of its training.

    flags: those of `FLAGS`, by name, as Python values. The conventions are "prediction_type", "clip",
    "variance", "sampler", "sampler_options", "value_range" and "normalize". ValueError, in one line: a file
    that is damaged, holds another network or contradicts a flag, and a flag that is unknown or missing.
    """
    if "version" in flags:  # the command line reads 1.5 as a number
        flags["version"] = str(flags["version"])
    given = Flags(flags, FLAGS, str(checkpoint))
    if checkpoint.is_folder:
        checkpoint = _file(checkpoint, given.get("milestone", _last(checkpoint), int))
    origin = str(checkpoint)
    tensors, milestone, ema = _stored(checkpoint, typed("flag ema", flags.get("ema", True), bool))
    if ema != flags.get("ema", ema):
        raise ValueError(f"{origin} holds no moving average of the weights; give the flag ema=False")
    if not ema and "ema" not in flags:
        given.assumed["ema"] = False
    network, buffers = _split(tensors, origin)
    check_kind(network, origin)
    version = _version(given, network, buffers, milestone)
    named = next((name for name in ("image_size", "size") if name in flags), None)
    if named is None:
        raise ValueError(f"{origin} does not tell the size of its images: give the flag image_size (--size)")
    size = image_size(named, flags[named])
    known = release(version, "downs.0.0.block1.norm.weight" in network)
    config = network_config(network, given, known, size, origin)
    labels = config.num_classes is not None
    schedule = _schedule(buffers, given, version, labels, fourier=config.fourier_channels is not None)
    unet = load_network(config, network_weights(config, network, known.standardised), checkpoint.path)
    objective = _objective(buffers, schedule, given, version, labels, config.learned_variance)
    steps = given.get("sampling_timesteps", schedule.T, int)
    eta = given.get("ddim_sampling_eta", 1.0 if labels or version < (1, 0) else 0.0, float)
    whole_number("flag sampling_timesteps", steps, 1, schedule.T)
    if steps < schedule.T and version < (0, 27, 8):
        raise ValueError(
            f"flag sampling_timesteps must be {schedule.T}: DDIM of releases before 0.27.8 is another"
        )
    # The noise is derived again from the clipped image, but for some predictions of noise.
    clipped = objective != "pred_noise" or (
        version >= (1, 4, 2) and not labels and not config.learned_variance
    )
    ddim = {"spacing": "truncated", "use_clipped_model_output": clipped, "eta": eta}
    conventions = {
        "prediction_type": _OBJECTIVES[objective],
        "clip": 1.0,
        "variance": "learned_range" if config.learned_variance else "fixed_small",
        "sampler": {"name": "ddim" if steps < schedule.T else "ddpm", "steps": steps},
        "sampler_options": {"ddim": ddim},
        "value_range": (0.0, 1.0),
        "normalize": True if labels else given.get("auto_normalize", True, bool),
    }
    if labels:
        conventions |= _guidance(given, version)
    return Imported(unet, schedule, conventions, given.assumed)


def _last(checkpoint: Checkpoint) -> int:
    """The largest number of the milestones in a folder."""
    found = [re.fullmatch(r"model-(\d+)\.pt", name) for name in os.listdir(checkpoint.path)]
    numbers = [int(match[1]) for match in found if match]
    if not numbers:
        raise ValueError(f"{checkpoint} holds no milestone, such as model-1.pt")
    return max(numbers)


def _file(checkpoint: Checkpoint, milestone: int | None = None) -> Checkpoint:
    """The checkpoint itself, or the milestone of a folder, by default the last."""
    if not checkpoint.is_folder:
        return checkpoint
    number = _last(checkpoint) if milestone is None else milestone
    return Checkpoint(checkpoint.path / f"model-{number}.pt")


class _Stored(NamedTuple):
    """The state dict of a GaussianDiffusion or a Unet, the milestone that holds it, and whether its numbers
    are the moving average of a milestone, or true where there is no milestone."""

    tensors: Tensors
    milestone: Mapping[str, Any] | None
    ema: bool


def _stored(checkpoint: Checkpoint, ema: bool = True) -> _Stored:
    """The parts of a file. ema: take the moving average of a milestone that has one."""
    contents, milestone = checkpoint.contents, None
    tensors = checkpoint.tensors
    if isinstance(contents, Mapping) and isinstance(contents.get("model"), Mapping) and len(contents) > 1:
        milestone, average = contents, contents.get("ema")
        ema = ema and isinstance(average, Mapping) and bool(average)
        found = milestone["ema" if ema else "model"]
        tensors = {k: v for k, v in found.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
    # ema_pytorch keeps both models beside its counters.
    prefix = "ema_model." if ema else "online_model."
    if any(name.startswith("ema_model.") for name in tensors):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return _Stored(without_prefixes(tensors), milestone, ema)


def _split(tensors: Tensors, origin: str) -> tuple[Tensors, Tensors]:
    """The tensors of the Unet, and those of the GaussianDiffusion around it."""
    prefix = next((name.removesuffix(_FIRST) for name in tensors if name.endswith(_FIRST)), None)
    if prefix is None:
        old = any("downs.0.0." in name for name in tensors)
        reason = "is of a release before 0.12, which is not read" if old else f"has no {_FIRST}"
        raise ValueError(f"{origin} {reason}: no Unet of {NAME} was found")
    network = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    buffers = {k: v for k, v in tensors.items() if not prefix or not k.startswith(prefix)}
    return network, buffers if prefix else {}


def _version(
    flags: Flags, network: Tensors, buffers: Tensors, milestone: Mapping[str, Any] | None
) -> Version:
    """The release that trained the network: the milestone's, the flag's, or the newest of its layout."""
    stored = milestone.get("version") if milestone is not None else None
    if isinstance(stored, str):
        flags.agree("version", stored, str)
    else:
        likely = likely_version(network, buffers, milestone is not None)
        stored = flags.get("version", likely, str)
    if not re.match(r"\d+(\.\d+)*", stored):
        raise ValueError(f"version must be a release such as 1.5.0, not {stored!r}")
    return tuple(int(number) for number in re.findall(r"\d+", stored)[:3])


def _schedule(buffers: Tensors, flags: Flags, version: Version, labels: bool, fourier: bool) -> NoiseSchedule:
    """The noise schedule in the buffers, or, for a Unet alone, that of the flags."""
    betas = buffers.get("betas")
    if betas is None:
        if fourier and "timesteps" not in flags.given:
            raise ValueError(
                f"{flags.origin} has learned frequencies and no betas, as the networks of {NAME}'s "
                "continuous-time and elucidated processes, which are not read; give the flag timesteps if "
                "it was trained by GaussianDiffusion"
            )
        T = whole_number("flag timesteps", flags.get("timesteps", 1000, int), 1, MAX_TIMESTEPS)
        kind = flags.get("beta_schedule", "sigmoid" if version >= (1, 0, 1) and not labels else "cosine", str)
        return _named_schedule(choice("flag beta_schedule", kind, _SCHEDULES), T)
    if betas.ndim != 1 or not len(betas) or not betas.is_floating_point():
        raise ValueError(
            f"{flags.origin}: betas are {betas.dtype} {list(betas.shape)}, not one number per timestep"
        )
    flags.agree("timesteps", len(betas), int)
    for kind in _SCHEDULES if len(betas) >= 20 else _SCHEDULES[1:]:  # linear goes beyond 1 with fewer
        schedule = _named_schedule(kind, len(betas))
        if torch.equal(schedule.betas.float(), betas):
            return schedule
    alphas, cumprod = NoiseSchedule.from_betas(betas).alphas, buffers.get("alphas_cumprod")
    if cumprod is not None and cumprod.shape == betas.shape:
        # A beta near 1 was rounded by more than its alpha is accurate.
        before = torch.cat([cumprod.new_ones(1), cumprod[:-1]]).double()
        alphas = torch.where(alphas < 0.5, cumprod.double() / before, alphas)
    return NoiseSchedule.from_betas(1 - alphas)


_SCHEDULES = ("linear", "cosine", "sigmoid")


def _named_schedule(kind: str, T: int) -> NoiseSchedule:
    """A schedule by its name in the original, with the original's default arguments."""
    if kind == "linear":
        return NoiseSchedule.linear(T, 1e-4 * 1000 / T, 0.02 * 1000 / T)
    if kind == "cosine":
        return NoiseSchedule.cosine(T)
    # Jabri et al. 2022, arXiv 2212.11972, appendix B, from -3 to 3. The ends are float32 in the original.
    t = torch.linspace(0, T, T + 1, dtype=torch.float64, device="cpu") / T
    start, end = torch.tensor([-3.0, 3.0], device="cpu").sigmoid()
    alphas_cumprod = (end - (6 * t - 3).sigmoid()) / (end - start)
    alphas_cumprod = alphas_cumprod / alphas_cumprod[0].clone()
    return NoiseSchedule.from_betas((1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(0, 0.999))


def _objective(
    buffers: Tensors,
    schedule: NoiseSchedule,
    flags: Flags,
    version: Version,
    labels: bool,
    learned_variance: bool,
) -> str:
    """The objective that the buffer of loss weights tells, or else the flag's."""
    if learned_variance:  # LearnedGaussianDiffusion samples by the predicted noise, whatever its objective
        return "pred_noise"
    stored = buffers.get("loss_weight")
    if stored is not None and stored.shape == schedule.betas.shape:
        snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
        # The weights are clipped / snr, clipped and clipped / (snr + 1), where clipped = min(snr, gamma).
        factors = {"pred_noise": snr, "pred_x0": torch.ones_like(snr), "pred_v": snr + 1}
        errors = {}
        for name, factor in factors.items():
            clipped = stored.double() * factor
            nearest = snr.clamp(max=clipped.max().item())
            errors[name] = ((clipped - nearest).abs() / nearest).max().item()
        best = min(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
        if errors[best] < 1e-2:
            flags.agree("objective", best, str)
            return best
    default = "pred_v" if version >= (1, 6, 3) and not labels else "pred_noise"
    return choice("flag objective", flags.get("objective", default, str), _OBJECTIVES)


def _guidance(flags: Flags, version: Version) -> dict[str, Any]:
    """The guidance of `classifier_free_guidance`, as arguments of `DDPM`."""
    new = version >= (1, 6, 3)
    return {
        "guidance_scale": flags.get("cond_scale", 6.0 if new else 3.0, float),
        "guidance_rescale": flags.get("rescaled_phi", 0.7 if new else 0.0, float),
        "guidance_parallel": 0.0 if version >= (2, 0, 18) else 1.0,
    }
