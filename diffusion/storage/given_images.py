"""Images and masks that people give to a model, as tensors in the shape and the range that it takes."""

import numpy as np
import torch
from PIL import Image

from ..models.network import NetworkConfig
from ..utils.validation import is_dense, readable, refuse
from .image_types import CHANNELS, NUMBERS, as_tensor, in_mode, pixels_of, tensor_of


def given_images(
    name: str, x: object, config: NetworkConfig, value_range: tuple[float, float]
) -> torch.Tensor:
    """Images as float32 [N, C, H, W] in value_range, for a network of this configuration.

    x: what `as_tensor` takes, or one image [C, H, W]; floats in value_range, or uint8 in 0..255. Of PIL
    images, the mode is made that of the network's channels, without transparency, and the middle square is
    scaled to its size. name: of the argument.

    ValueError for images of another kind, range, size or number of channels.
    """
    channels = config.in_channels
    images = _of_pictures(name, x, config, "L" if channels == 1 else "RGB")
    if images is None:
        images = as_tensor(x if getattr(x, "ndim", 4) != 3 else [x], name)
    if images.ndim != 4 or len(images) == 0 or images.shape[1] != channels:
        raise ValueError(f"{name} must be [N, {channels}, H, W] or PIL images, not {list(images.shape)}")
    _check_size(name, images, config)
    low, high = value_range
    if images.dtype == torch.uint8:
        return images.float() / 255 * (high - low) + low
    if not images.is_floating_point():
        raise ValueError(
            f"{name} must be floats in [{low:g}, {high:g}], or uint8 in 0..255, not {images.dtype}"
        )
    images = images.detach().float()
    if readable(images):
        least, most = images.aminmax()
        if not low - (high - low) <= least <= most <= high + (high - low):
            raise ValueError(
                f"{name} must be in [{low:g}, {high:g}], and reaches from {least:.4g} to {most:.4g}; "
                "images of 0..255 are uint8"
            )
    return images


def given_mask(x: object, config: NetworkConfig) -> torch.Tensor:
    """A mask as float32 [N, 1, H, W] in 0..1: 1 where images are painted anew, 0 where they are known.

    x: bool, uint8 or floats in 0..1, [H, W], [N, H, W] or [N, 1, H, W], or PIL images, which are cut and
    scaled as those of `given_images`. uint8 whose largest value is 1 is 0/1, and other uint8 is 0..255, of
    which at least half white is 1. ValueError for anything else.
    """
    mask = _of_pictures("mask", x, config, "L")
    if mask is None:
        if isinstance(x, np.ndarray) and x.dtype.kind in NUMBERS:
            x = tensor_of(x)
        if not isinstance(x, torch.Tensor) or x.dtype.is_complex or not is_dense(x):
            refuse("mask", "a tensor or array [H, W] or [N, 1, H, W], or a PIL image", x)
        mask = x.reshape(-1, 1, *x.shape[-2:]) if x.ndim in (2, 3) else x
    if mask.ndim != 4 or len(mask) == 0 or mask.shape[1] != 1:
        raise ValueError(f"mask must be [H, W] or [N, 1, H, W], not {list(mask.shape)}")
    _check_size("mask", mask, config)
    if mask.dtype == torch.uint8:
        mask = mask >= (1 if readable(mask) and mask.max() == 1 else 128)
    mask = mask.detach().float()
    if readable(mask) and not ((mask >= 0) & (mask <= 1)).all():
        raise ValueError("mask must be 0 where the image is known and 1 where it is painted anew")
    return mask


def _check_size(name: str, images: torch.Tensor, config: NetworkConfig) -> None:
    try:
        config.check_size(images.shape[2:])
    except ValueError as error:
        raise ValueError(f"{name} is {list(images.shape)}: {error}") from None


def _of_pictures(name: str, x: object, config: NetworkConfig, mode: str) -> torch.Tensor | None:
    """PIL images as uint8 [N, C, H, W] of the network's size; None for anything else."""
    pictures = [x] if isinstance(x, Image.Image) else x
    if not isinstance(pictures, list | tuple) or not pictures:
        return None
    if not all(isinstance(picture, Image.Image) for picture in pictures):
        return None
    if config.in_channels not in CHANNELS and name != "mask":
        raise ValueError(
            f"{name} must be a tensor [N, {config.in_channels}, H, W]; PIL images have 1 or 3 channels"
        )
    pictures = [in_mode(picture, mode) for picture in pictures]
    if name == "mask" and max(picture.getextrema()[1] for picture in pictures) == 1:
        pictures = [picture.point(lambda value: 255 * min(value, 1)) for picture in pictures]
    return as_tensor([pixels_of(_middle(picture, *config.image_shape), mode) for picture in pictures])


def _middle(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The middle of a picture, of the largest part of this shape, scaled to it."""
    if picture.size == (width, height):
        return picture
    share = min(picture.width / width, picture.height / height)
    wide, high = round(share * width), round(share * height)
    left, top = (picture.width - wide) // 2, (picture.height - high) // 2
    picture = picture.crop((left, top, left + wide, top + high))
    return picture.resize((width, height), Image.Resampling.LANCZOS)
