"""Images to files: grids as PNG, JPEG or WebP, the reverse process as GIF, arrays as .npz."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..process.value_range import SIGNED, change_range, check_range
from ..utils.errors import printable
from ..utils.validation import number, shown, whole_number, whole_numbers
from ..utils.words import counted
from .atomic import replacing
from .image_types import as_tensor

MAX_PIXELS = 2**28  # pixels of a picture
MAX_VALUE = 10  # in an image in [-1, 1] without negative values; those of 0..255 have larger ones
CAPTION = 14  # rows of pixels below an image in which its caption is written, in Pillow's own font
PICTURES: dict[str, dict[str, Any]] = {  # how Pillow writes the files of these names
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    ".webp": {"format": "WEBP", "lossless": True},
}
Images = torch.Tensor | np.ndarray | Image.Image | Sequence[Any]


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Images uint8 in 0..255, of any shape, to float32 in [-1, 1]: the inverse of `to_uint8`."""
    return images.float() / 127.5 - 1


def to_uint8(x: torch.Tensor, value_range: tuple[float, float] = SIGNED) -> torch.Tensor:
    """Images [..., C, H, W] in value_range to uint8 0..255, rounded to nearest; values outside are clipped.

    Images in uint8 are returned unchanged. ValueError for other types, and for floats of 0..255 in another
    range, which would all be white.
    """
    if x.dtype == torch.uint8:
        return x
    low, high = check_range("value_range", value_range)
    if not x.is_floating_point():
        raise ValueError(f"images must be floats in [{low:g}, {high:g}], or uint8 in 0..255, not {x.dtype}")
    x = change_range(x.float(), (low, high), SIGNED)
    # Noise and unclipped samples have negative values.
    if x.numel() and x.min() >= -1 and x.max() > MAX_VALUE:
        raise ValueError(
            f"images of floats must be in [{low:g}, {high:g}], and these look like those of 0..255; give "
            "x.to(torch.uint8), or another value_range"
        )
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def check_grid(
    shape: Sequence[int],
    columns: int | None = None,
    padding: int = 2,
    scale: int = 1,
    captions: Sequence[str] | None = None,
) -> None:
    """ValueError if `make_grid` would refuse images of this shape [N, C, H, W]."""
    scale, padding = whole_number("scale", scale, 1), whole_number("padding", padding, 0)
    if columns is not None:
        whole_number("columns", columns, 1)
    if len(shape) != 4 or shape[0] == 0:
        hint = "; of one image [C, H, W], take x[None]" if len(shape) == 3 else ""
        raise ValueError(f"a picture needs images [N, C, H, W] with N > 0, not {list(shape)}{hint}")
    channels = shape[1]
    if channels not in (1, 3):
        raise ValueError(f"a picture needs images of 1 or 3 channels, not {channels}")
    if captions is not None and (isinstance(captions, str) or len(captions) != shape[0]):
        raise ValueError(
            f"captions must be {counted(shape[0], 'text')}, one for each image, not {shown(captions)}"
        )
    height, width = _canvas(shape, columns, padding, scale, CAPTION if captions is not None else 0)
    if height * width > MAX_PIXELS:
        raise ValueError(f"a picture of {width:,} x {height:,} pixels is too large")


def _canvas(
    shape: Sequence[int], columns: int | None, padding: int, scale: int, caption: int
) -> tuple[int, int]:
    count, _, height, width = shape
    columns = min(columns or 10, count)
    rows = math.ceil(count / columns)
    height = height * scale + caption + padding
    return rows * height + padding, columns * (width * scale + padding) + padding


def make_grid(
    x: Images,
    columns: int | None = None,
    padding: int = 2,
    scale: int = 1,
    value_range: tuple[float, float] = SIGNED,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Draws images, C = 1 or 3, row by row on a black ground.

    x: a tensor [N, C, H, W], an array [N, C, H, W] or [N, H, W, C], of floats in value_range or of uint8 in
    0..255, or a list of such images or of PIL images, of one size. columns: images in a row, by default
    ten, or all if there are fewer. padding: pixels between images and around them. scale: each pixel is drawn
    as scale x scale pixels. captions: a text for each image, drawn below it in CAPTION rows of pixels, and
    cut where it is wider than the image. ValueError for other images, or numbers below their least value.
    """
    x = as_tensor(x)
    check_grid(x.shape, columns, padding, scale, captions)
    count, channels, height, width = x.shape
    columns = min(columns or 10, count)
    pixels = to_uint8(x, value_range).permute(0, 2, 3, 1).cpu().numpy()
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = height * scale, width * scale
    caption = 0 if captions is None else CAPTION
    canvas = np.zeros((*_canvas(x.shape, columns, padding, scale, caption), channels), np.uint8)
    corners = [
        (padding + row * (height + caption + padding), padding + column * (width + padding))
        for row, column in (divmod(index, columns) for index in range(count))
    ]
    for image, (top, left) in zip(pixels, corners, strict=True):
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.squeeze(2) if channels == 1 else canvas)
    for text, (top, left) in zip(captions or (), corners, strict=False):
        _write(picture, text, (left, top + height), width)
    return picture


def _write(picture: Image.Image, text: str, corner: tuple[int, int], width: int) -> None:
    """Writes a text into the CAPTION rows below an image, in its middle, cut to its width."""
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    text = printable(str(text))
    if draw.textlength(text, font) > width:
        while text and draw.textlength(f"{text}..", font) > width:
            text = text[:-1]
        text = f"{text}.." if text else ""
    left = corner[0] + (width - draw.textlength(text, font)) / 2
    draw.text((left, corner[1]), text, fill="white", font=font)


def picture_format(path: str | os.PathLike) -> dict[str, Any]:
    """The arguments with which Pillow saves a file of this name; ValueError for another ending."""
    found = PICTURES.get(Path(path).suffix.lower())
    if found is None:
        raise ValueError(f"cannot tell the format of {path}; end its name in .png, .jpg, .jpeg or .webp")
    return found


def save_grid(
    x: Images,
    path: str | os.PathLike,
    columns: int | None = None,
    padding: int = 2,
    scale: int = 1,
    value_range: tuple[float, float] = SIGNED,
    captions: Sequence[str] | None = None,
) -> None:
    """Writes images as one picture, drawn by `make_grid`: PNG, JPEG or WebP, by the ending of its name.

    x: a tensor [N, C, H, W], an array [N, C, H, W] or [N, H, W, C], of floats in value_range or of uint8 in
    0..255, or a list of such images or of PIL images, of one size. C is 1 or 3. JPEG has quality 95, and WebP
    is lossless. columns, padding, scale, captions: see `make_grid`. ValueError for other images, another
    ending, or if the file cannot be written.
    """
    grid = make_grid(x, columns, padding, scale, value_range, captions)
    with replacing(path) as (temporary,):
        grid.save(temporary, **picture_format(path))


def save_gif(
    frames: Sequence[Images],
    path: str | os.PathLike,
    columns: int | None = None,
    padding: int = 2,
    scale: int = 1,
    duration: float = 0.08,
    hold: float = 1.5,
    value_range: tuple[float, float] = SIGNED,
) -> None:
    """Writes an endless GIF whose frames are batches of images, each drawn by `make_grid`.

    duration: seconds that a frame is shown; hold: seconds that the last one is shown; both at most 600.
    ValueError without frames, for other images, another ending than .gif, or if the file cannot be written.
    """
    if Path(path).suffix.lower() != ".gif":
        raise ValueError(f"the name of a GIF ends in .gif, not as {path}; save_grid writes other pictures")
    duration, hold = number("duration", duration, 0, 600), number("hold", hold, 0, 600)
    if isinstance(frames, torch.Tensor | np.ndarray) and frames.ndim < 5:
        raise ValueError(
            f"frames must be a list of images [N, C, H, W], one for each frame, not {shown(frames)}; "
            "frames=[x] is one frame, and frames=x[:, None] has a frame for each image of x"
        )
    if not isinstance(frames, Sequence | torch.Tensor | np.ndarray) or not len(frames):
        raise ValueError("a GIF needs at least one frame, in a list of images [N, C, H, W]")
    pictures = [make_grid(frame, columns, padding, scale, value_range) for frame in frames]
    durations = [round(1000 * duration)] * (len(pictures) - 1) + [round(1000 * hold)]
    with replacing(path) as (temporary,):
        pictures[0].save(
            temporary, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0
        )


def save_npz(
    x: Images,
    path: str | os.PathLike,
    labels: Sequence[int] | torch.Tensor | None = None,
    **metadata: Any,
) -> None:
    """Writes an .npz of `images` uint8 [N, H, W, C], the layout of evaluation suites, and `labels` int64 [N].

    x: images as for `save_grid`, floats in [-1, 1] or uint8 in 0..255, of any C. labels: [N], or None for
    none. metadata: further arrays, or values that NumPy makes into arrays. ValueError for other images, or if
    the file cannot be written.
    """
    x = as_tensor(x)
    if x.ndim != 4:
        raise ValueError(f"images must be [N, C, H, W], not {list(x.shape)}")
    arrays: dict[str, Any] = {"images": to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()}
    if labels is not None:
        arrays["labels"] = whole_numbers("labels", labels).numpy()
    arrays.update({key: np.asarray(value) for key, value in metadata.items()})
    with replacing(path) as (temporary,), open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
