"""Checks of a network's arguments, and timesteps as fractions."""

from collections.abc import Sequence

import torch

from ..utils.validation import readable, shown
from .network import NetworkConfig


def check_arguments(
    config: NetworkConfig, x: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor | None
) -> None:
    """ValueError unless the arguments of a network's `forward` fit its configuration.

    The values of labels are checked only where they can be read without waiting for a device.
    """
    check_images(config, x)
    check_timesteps(timesteps)
    if timesteps.shape != x.shape[:1]:
        raise ValueError(f"timesteps must have shape [{len(x)}], not {list(timesteps.shape)}")
    if labels is None:
        if config.num_classes is not None and config.null_label is None:
            raise ValueError("this model was trained without a null label, so it needs labels")
        return
    if config.num_classes is None:
        raise ValueError("this model is unconditional; labels must be None")
    check_labels(config, labels, x.shape[:1])


def check_images(config: NetworkConfig, x: object) -> None:
    """ValueError unless x is a tensor [B, in_channels, H, W] of a size that the network takes."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"x must be a tensor [B, {config.in_channels}, H, W], not {shown(x)}")
    if x.ndim != 4 or x.shape[1] != config.in_channels:
        raise ValueError(f"x must have shape [B, {config.in_channels}, H, W], not {list(x.shape)}")
    config.check_size(x.shape[2:])


def check_timesteps(timesteps: object) -> None:
    """ValueError unless timesteps are a tensor [B]."""
    if isinstance(timesteps, torch.Tensor) and timesteps.ndim == 1:
        return
    one = "such as torch.full((len(x),), 3)"
    given = shown(timesteps)
    if isinstance(timesteps, torch.Tensor):
        given = f"of shape {list(timesteps.shape)}"
    raise ValueError(f"timesteps must be a tensor [B], a number for each image, {one}, not {given}")


def check_labels(config: NetworkConfig, labels: object, shape: Sequence[int]) -> None:
    """ValueError unless labels are integers [B] in 0..K-1, or K for no label.

    shape: [B]. The values are checked only where they can be read without waiting for a device.
    """
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"labels must be a tensor of integers {list(shape)}, not {type(labels).__name__}")
    if labels.shape != torch.Size(shape) or labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"labels must be integers of shape {list(shape)}, not {labels.dtype} {list(labels.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(labels):
        labels = torch._C._functorch.get_unwrapped(labels)  # vmap passes one label; this is the batch
    if labels.device.type != "cpu" or isinstance(labels, torch._subclasses.FakeTensor):
        return
    assert config.num_classes is not None
    last, null = config.num_classes - 1 + config.has_null_label, config.null_label
    if labels.numel() and not bool(((labels >= 0) & (labels <= last)).all()):
        no_label = "" if null is None else f" ({null} for no label)"
        raise ValueError(f"labels must be in 0..{last}{no_label}, not {labels.min()}..{labels.max()}")


def time_fraction(timesteps: torch.Tensor, num_timesteps: int) -> torch.Tensor:
    """Timesteps as the fractions of T that a network was trained with, floating point, like `timesteps`.

    timesteps: integers 0..T, which are divided by T = num_timesteps; or fractions in [0, 1], which stay.
    ValueError for other floating-point numbers, where they can be read without waiting for a device.
    """
    if not timesteps.is_floating_point():
        return timesteps / num_timesteps
    if _known(timesteps) and not 0 <= float(timesteps.min()) <= float(timesteps.max()) <= 1:
        raise ValueError(
            f"floating-point timesteps of this network are fractions of {num_timesteps} in [0, 1], not "
            f"{float(timesteps.min()):g}..{float(timesteps.max()):g}; give integers for 0..{num_timesteps}"
        )
    return timesteps


def _known(values: torch.Tensor) -> bool:
    """Whether there are values that can be read without waiting for a device."""
    return values.device.type == "cpu" and readable(values) and values.numel() > 0
