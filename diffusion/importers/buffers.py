"""A state dict that holds a whole DDPM: the network's tensors, and the schedule in its buffers."""

from typing import Any

import torch

from ..process.schedule import MAX_TIMESTEPS, NoiseSchedule
from ..storage.reading import check_weights
from ..utils.validation import number, whole_number
from .naming import Source

# The loops of these projects, over a schedule of T + 1 betas of which the first is never visited: every
# timestep from T to 1, the variance beta, and an end at the noise of timestep 0.
SAMPLER = {"name": "ddpm", "variance": "fixed_large", "steps_offset": 1, "set_alpha_to_one": False}
FLAGS = {
    "size": "height and width of the images, such as 32 or 32x48",
    "T": "number of timesteps, where the file holds no schedule",
    "beta_start": "first beta of the linear schedule, where the file holds none",
    "beta_end": "last beta of the linear schedule, where the file holds none",
}
_STORED = ("beta_schedule", "sqrt_beta_t", "alpha_t", "bar_alpha_t_schedule", "alphabar_t")
PRECISE = 1e-5  # relative error of a float32 buffer


def network_part(tensors: dict[str, torch.Tensor], marker: str) -> dict[str, torch.Tensor]:
    """The network's tensors by their own names: those that share the prefix of the name ending in `marker`.

    Counters of batch normalisation are left out. Empty if no name, or more than one, ends so.
    """
    prefixes = [name.removesuffix(marker) for name in tensors if f".{name}".endswith(f".{marker}")]
    if len(prefixes) != 1:
        return {}
    return {
        name.removeprefix(prefixes[0]): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefixes[0]) and not name.endswith("num_batches_tracked")
    }


def stored_betas(tensors: dict[str, torch.Tensor], origin: str) -> torch.Tensor | None:
    """The betas, float64, that a state dict holds under the names of these projects; None if it holds none.

    ValueError if they contradict what is stored beside them.
    """
    stored = {name: tensor for name in _STORED if (tensor := _unique(tensors, name)) is not None}
    check_weights(stored, origin)
    for name, values in stored.items():
        if values.ndim != 1 or not 2 <= len(values) <= MAX_TIMESTEPS:
            raise ValueError(f"{origin}: {name} must hold T + 1 numbers, not {list(values.shape)}")
    found = {name: tensor.double() for name, tensor in stored.items()}
    if "beta_schedule" in found:
        betas = found["beta_schedule"]
    elif "sqrt_beta_t" in found:
        betas = found["sqrt_beta_t"].square()
    elif "alpha_t" in found:
        betas = 1 - found["alpha_t"]
    else:
        return None
    products = torch.cumprod(1 - betas, dim=0)
    for name, expected in (
        ("bar_alpha_t_schedule", products),
        ("alphabar_t", products),
        ("alpha_t", 1 - betas),
    ):
        if name in found and not (
            found[name].shape == betas.shape
            and torch.allclose(found[name], expected, rtol=_precision(stored[name], 1e-3), atol=1e-6)
        ):
            raise ValueError(f"{origin}: {name} contradicts the betas beside it")
    return betas


def _unique(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor | None:
    """The one tensor of this name, with a prefix or without; None if there is no such or several."""
    found = [tensor for key, tensor in tensors.items() if f".{key}".endswith(f".{name}")]
    return found[0] if len(found) == 1 else None


def schedule_of(betas: torch.Tensor) -> NoiseSchedule:
    """The linear schedule whose betas these are, rounded to float32; or else a schedule of the betas."""
    start, end = (float(f"{float(beta):.6g}") for beta in betas[[0, -1]])
    if 0 < start < 1 and 0 < end < 1:
        linear = NoiseSchedule.linear(len(betas), start, end)
        if torch.allclose(linear.betas, betas, rtol=PRECISE, atol=0):
            return linear
    return NoiseSchedule.from_betas(betas)


def read_schedule(
    tensors: dict[str, torch.Tensor], flags: dict[str, Any], T: int, origin: str
) -> tuple[NoiseSchedule, dict[str, Any]]:
    """The schedule of T + 1 betas, stored or by flags, and the flags that were assumed.

    flags: among them T, beta_start and beta_end, which are taken from it. T: the default. ValueError for
    flags that contradict a stored schedule.
    """
    given = {name: flags.pop(name) for name in ("T", "beta_start", "beta_end") if name in flags}
    betas = stored_betas(tensors, origin)
    if betas is not None:
        steps = len(betas) - 1
        if given not in ({}, {"T": steps}):
            raise ValueError(f"{origin} holds its schedule of {steps} steps; leave out {', '.join(given)}")
        return schedule_of(betas), {}
    defaults = {"T": T, "beta_start": 1e-4, "beta_end": 0.02}
    values = defaults | given
    T = whole_number("flag T", values["T"], 1, MAX_TIMESTEPS - 1)
    ends = (number(f"flag {name}", values[name], above=0, below=1) for name in ("beta_start", "beta_end"))
    return NoiseSchedule.linear(T + 1, *ends), {k: v for k, v in defaults.items() if k not in given}


def batch_norm(source: Source, name: str, foreign: str) -> dict[str, torch.Tensor]:
    """The tensors of a batch normalisation, as `Source.layer`, with a counter that begins anew."""
    ours = source.layer(name, foreign, ("weight", "bias", "running_mean", "running_var"))
    return ours | {f"{name}.num_batches_tracked": torch.zeros((), dtype=torch.int64, device="cpu")}


def conventions(schedule: NoiseSchedule, value_range: tuple[float, float], **sampler: Any) -> dict[str, Any]:
    """The further arguments of DDPM. sampler: options of the model's sampler beyond SAMPLER."""
    return {
        "prediction_type": "epsilon",
        "variance": "fixed_large",
        "clip": None,
        "sampler": {**SAMPLER, "steps": schedule.T - 1, **sampler},
        "value_range": value_range,
        "normalize": False,
    }


def _precision(tensor: torch.Tensor, otherwise: float) -> float:
    return max(otherwise, 16 * torch.finfo(tensor.dtype).eps)
