"""Images as people have them: tensors, arrays of either layout, PIL images; and back."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..utils.validation import choice, is_dense, refuse

OUTPUTS = ("tensor", "pil", "numpy")
CHANNELS = (1, 3)  # of a picture
GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
NUMBERS = "buif"  # NumPy's kinds of dtypes
EXPECTED = "a tensor or array [N, C, H, W], or PIL images"


def as_tensor(x: object, name: str = "images") -> torch.Tensor:
    """Images as a tensor; PIL images, and images in a list, which must have one size, as [N, C, H, W].

    x: a tensor as it is; an array, whose channels may also be its last dimension, where dimension 1 can be no
    channels; a PIL image or a list of them, as uint8 in grey or RGB; a list of tensors or arrays of one image
    each. name: of the argument. ValueError for anything else.
    """
    if isinstance(x, torch.Tensor):
        if not is_dense(x):
            refuse(name, f"{EXPECTED}, with values", x)
        return x
    if isinstance(x, Image.Image):
        x = [x]
    if isinstance(x, Sequence) and len(x) and not isinstance(x, str | bytes):
        return _stacked(x, name)
    if isinstance(x, np.ndarray) and x.dtype.kind in NUMBERS:
        if x.ndim == 4 and x.shape[1] not in CHANNELS and x.shape[3] in CHANNELS:
            x = x.transpose(0, 3, 1, 2)
        return tensor_of(x)
    if isinstance(x, Sequence) and not len(x):
        refuse(name, f"{EXPECTED}, at least one", x)
    kind = f"{type(x).__name__}{f' of {x.dtype}' if isinstance(x, np.ndarray) else ''}"
    raise ValueError(f"{name} must be {EXPECTED}, not {kind}")


def tensor_of(array: np.ndarray) -> torch.Tensor:
    """An array of numbers as a tensor of the same memory, if PyTorch has its dtype, byte order and strides.

    The tensor of a read-only array must not be written to. Its memory is not copied, since it may be that of
    a large file.
    """
    native = np.float64 if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    array = np.ascontiguousarray(array, native)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writ")
        return torch.from_numpy(array)


def _stacked(images: Sequence[object], name: str) -> torch.Tensor:
    """Images of one kind and size, [N, C, H, W]."""
    if all(isinstance(image, Image.Image) for image in images):
        pictures = [image for image in images if isinstance(image, Image.Image)]
        mode = "L" if all(image.mode in GREY for image in pictures) else "RGB"
        arrays = [pixels_of(image, mode) for image in pictures]
    elif all(isinstance(image, torch.Tensor) for image in images):
        tensors = [image for image in images if isinstance(image, torch.Tensor)]
        if len({image.shape for image in tensors}) > 1:
            raise ValueError(_sizes(name, [image.shape for image in tensors]))
        return torch.stack([as_tensor(image, name) for image in tensors])
    elif all(isinstance(image, np.ndarray) and image.dtype.kind in NUMBERS for image in images):
        arrays = [image for image in images if isinstance(image, np.ndarray)]
    else:
        found = ", ".join(sorted({type(image).__name__ for image in images}))
        raise ValueError(f"{name} must be {EXPECTED}, not a {type(images).__name__} of {found}")
    if len({image.shape for image in arrays}) > 1:
        raise ValueError(_sizes(name, [image.shape for image in arrays]))
    return as_tensor(np.stack(arrays), name)


def _sizes(name: str, shapes: Sequence[tuple[int, ...]]) -> str:
    first = shapes[0]
    other = next(shape for shape in shapes if shape != first)
    return f"{name} must have one size, and these are {list(first)} and {list(other)}"


def pixels_of(image: Image.Image, mode: str) -> np.ndarray:
    """A PIL image as uint8 [H, W, 1 or 3] of mode "L" or "RGB". Errors as `in_mode`."""
    return np.array(in_mode(image, mode)).reshape(image.height, image.width, -1)


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """A PIL image in mode "L" or "RGB"; transparency is dropped, as from images to train on.

    ValueError for one of more than 8 bits.
    """
    if image.mode not in (*GREY, *COLOUR):
        raise ValueError(
            f"a PIL image of mode {image.mode!r} has more than 8 bits; "
            "scale it to 0..255 and make it 'L' or 'RGB'"
        )
    return image.convert(mode)


def check_output(output: str, channels: int) -> str:
    """`output` if it is one of OUTPUTS that images of so many channels can have; else a ValueError."""
    choice("output", output, OUTPUTS)
    if output == "pil" and channels not in CHANNELS:
        raise ValueError(f"output 'pil' needs images of 1 or 3 channels, not {channels}; take 'numpy'")
    return output


def as_output(pixels: torch.Tensor, output: str) -> np.ndarray | list[Image.Image]:
    """Images uint8 [N, C, H, W] as `output`: "numpy", uint8 [N, H, W, C], or "pil", a list of N images."""
    array = pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    if output == "numpy":
        return array
    return [Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image) for image in array]
