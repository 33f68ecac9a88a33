"""Checks of the images that a model is trained on."""

import torch

from ..utils.validation import readable

MAX_PIXEL = 10  # magnitude in an image to train on: standardised images pass, those of 0..255 do not


def check_images(x0: torch.Tensor) -> None:
    """ValueError for images that are not a tensor, an empty batch, bytes, or floats of 0..255."""
    if not isinstance(x0, torch.Tensor):
        raise ValueError(f"images must be a tensor [B, C, H, W], not {type(x0).__name__}")
    if x0.ndim != 4 or len(x0) == 0:
        raise ValueError(f"images must be [B, C, H, W] of at least one image, not {list(x0.shape)}")
    if not x0.is_floating_point():
        raise ValueError(f"images must be floats in [-1, 1], not {x0.dtype}; convert 0..255 by x / 127.5 - 1")
    # On other devices reading values would synchronise.
    if x0.device.type != "cpu" or not x0.numel() or not readable(x0):
        return
    low, high = x0.detach().aminmax()
    if not -MAX_PIXEL <= low <= high <= MAX_PIXEL:
        raise ValueError(
            f"images must be in [-1, 1], and these reach from {low:.4g} to {high:.4g}; "
            "convert 0..255 by x / 127.5 - 1"
        )
