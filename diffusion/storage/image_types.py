"""Images as people have them: tensors, arrays of either layout, PIL images; and back."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ..utils.validation import choice

OUTPUTS = ("tensor", "pil", "numpy")
CHANNELS = (1, 3)  # of a picture
GREY, COLOUR = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")
EXPECTED = "a tensor or array [N, C, H, W], or PIL images"


def as_tensor(x: object) -> torch.Tensor:
    """Images as a tensor; PIL images, and images in a list, which must have one size, as [N, C, H, W].

    x: a tensor as it is; an array, whose channels may also be its last dimension, where dimension 1 can be no
    channels; a PIL image or a list of them, as uint8 in grey or RGB; a list of tensors or arrays of one image
    each. ValueError for anything else.
    """
    if isinstance(x, torch.Tensor):
        return x
    if isinstance(x, Image.Image):
        x = [x]
    if isinstance(x, Sequence) and len(x) and not isinstance(x, str | bytes):
        return _stacked(x)
    if isinstance(x, np.ndarray) and x.dtype.kind in "buif":
        if x.ndim == 4 and x.shape[1] not in CHANNELS and x.shape[3] in CHANNELS:
            x = x.transpose(0, 3, 1, 2)
        return torch.from_numpy(np.ascontiguousarray(x))
    kind = f"{type(x).__name__}{f' of {x.dtype}' if isinstance(x, np.ndarray) else ''}"
    raise ValueError(f"images must be {EXPECTED}, not {kind}")


def _stacked(images: Sequence[object]) -> torch.Tensor:
    """Images of one kind and size, [N, C, H, W]."""
    if all(isinstance(image, Image.Image) for image in images):
        pictures = [image for image in images if isinstance(image, Image.Image)]
        mode = "L" if all(image.mode in GREY for image in pictures) else "RGB"
        arrays = [pixels_of(image, mode) for image in pictures]
    elif all(isinstance(image, torch.Tensor) for image in images):
        tensors = [image for image in images if isinstance(image, torch.Tensor)]
        if len({image.shape for image in tensors}) > 1:
            raise ValueError(_sizes([image.shape for image in tensors]))
        return torch.stack(tensors)
    elif all(isinstance(image, np.ndarray) and image.dtype.kind in "buif" for image in images):
        arrays = [image for image in images if isinstance(image, np.ndarray)]
    else:
        found = ", ".join(sorted({type(image).__name__ for image in images}))
        raise ValueError(f"images must be {EXPECTED}, not a {type(images).__name__} of {found}")
    if len({image.shape for image in arrays}) > 1:
        raise ValueError(_sizes([image.shape for image in arrays]))
    return as_tensor(np.stack(arrays))


def _sizes(shapes: Sequence[tuple[int, ...]]) -> str:
    first = shapes[0]
    other = next(shape for shape in shapes if shape != first)
    return f"images must have one size, and these are {list(first)} and {list(other)}"


def pixels_of(image: Image.Image, mode: str) -> np.ndarray:
    """A PIL image as uint8 [H, W, 1 or 3] of mode "L" or "RGB". ValueError for one of more than 8 bits."""
    if image.mode not in (*GREY, *COLOUR):
        raise ValueError(
            f"a PIL image of mode {image.mode!r} has more than 8 bits; "
            "scale it to 0..255 and make it 'L' or 'RGB'"
        )
    return np.array(image.convert(mode)).reshape(image.height, image.width, -1)


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
