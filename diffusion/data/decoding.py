"""Decodes the images of a folder or zip into one array, in memory or in a cache file."""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image
from tqdm import tqdm

from ..storage.atomic import remove_leftovers, replacing
from ..storage.locks import locked
from ..storage.reading import name_of, open_regular
from ..utils.memory import amount
from .image_files import FORMATS, ImageFiles

MAX_PIXELS = 2**26  # pixels of one image
# Keys of the metadata that can hold the orientation.
_ORIENTATION_KEYS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
# Transposition for each EXIF orientation; an image of orientation 1 is upright.
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Transpositions that exchange height and width.
_QUARTER_TURNS = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}
IMAGES_PER_UPDATE = 256  # images decoded per progress update
MAX_SURVEYED = 1000  # images whose sizes are read before a size is chosen


def channels_of_files(source: ImageFiles) -> int:
    return 3 if any(_is_colour(source, name) for name in source.names) else 1


def sizes_of_files(source: ImageFiles) -> list[tuple[int, int]]:
    """Height and width, when upright, of up to MAX_SURVEYED images.

    These are evenly spaced, because files are often sorted by class.
    """
    count = min(MAX_SURVEYED, len(source.names))
    images = (open_image(source, source.names[k * len(source.names) // count]) for k in range(count))
    return [
        (image.width, image.height) if _turn(image) in _QUARTER_TURNS else (image.height, image.width)
        for image in images
    ]


def middle_square(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle of an image, scaled (Lanczos) to size x size."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.LANCZOS)


def _is_colour(source: ImageFiles, name: str) -> bool:
    return not open_image(source, name).mode.startswith(("1", "L", "I", "F"))


def open_image(source: ImageFiles, name: str) -> Image.Image:
    """An image with only its header read; ValueError if the file is not an image or exceeds MAX_PIXELS."""
    data = source.read(name)
    try:
        image = Image.open(io.BytesIO(data), formats=sorted(set(FORMATS.values())))
    except Exception as error:
        raise _undecodable(source, name, error) from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{source.path}/{name} is too large: {image.width} x {image.height}")
    return image


def _undecodable(source: ImageFiles, name: str, error: Exception) -> ValueError:
    reason = "no image" if isinstance(error, PIL.UnidentifiedImageError) else error
    return ValueError(
        f"{source.path}/{name} cannot be decoded: {reason}; mend or remove it".replace("\n", " ")
    )


class Decoder:
    """Decodes files into one array uint8 [N, C, H, W] of `shape` and `bytes`.

    channels: 1 or 3. size: the middle square of each image is scaled to size x size; None keeps the images as
    they are, which then must all have one size.
    """

    def __init__(self, source: ImageFiles, channels: int, size: int | None):
        self.source, self.channels, self.size = source, channels, size
        self.width, self.height = (size, size) if size else self._upright(source.names[0]).size
        self.shape = (len(source.names), channels, self.height, self.width)

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def fill(self, images: np.ndarray, progress: bool) -> None:
        """Decodes all images into an array of `shape`, with as many threads as PyTorch uses."""

        def decode(index: int) -> None:
            images[index] = self._decode(self.source.names[index])

        count = len(images)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            bar = tqdm(total=count, unit=" images", desc=str(self.source.path), disable=not progress)
            with bar:
                for start in range(0, count, IMAGES_PER_UPDATE):
                    part = range(start, min(count, start + IMAGES_PER_UPDATE))
                    for _ in threads.map(decode, part):
                        pass
                    bar.update(len(part))

    def _decode(self, name: str) -> np.ndarray:
        image = self._upright(name)
        if self.size is None and (image.height, image.width) != (self.height, self.width):
            raise ValueError(
                f"images of one size are needed, but {self.source.path}/{name} is {image.width} x "
                f"{image.height}, and {self.source.names[0]} is {self.width} x {self.height}; make them of "
                "one size, or add --resize"
            )
        if self.size is not None:
            image = middle_square(image, self.size)
        pixels = np.asarray(image)
        return pixels[None] if self.channels == 1 else pixels.transpose(2, 0, 1)

    def _upright(self, name: str) -> Image.Image:
        """An image decoded, turned upright as viewers show it, in 8 bits and `channels` channels."""
        image = open_image(self.source, name)
        try:
            return upright(image).convert("L" if self.channels == 1 else "RGB")
        except Exception as error:
            raise _undecodable(self.source, name, error) from error


def upright(image: Image.Image) -> Image.Image:
    """An image turned upright as viewers show it, in 8 bits; ValueError for floating-point pixels."""
    image.load()
    turn = _turn(image)
    image = _eight_bits(image)
    return image if turn is None else image.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transposition that makes an image upright, by the EXIF or XMP that were read; None for none."""
    if image.info.keys().isdisjoint(_ORIENTATION_KEYS):  # parsing EXIF takes time
        return None
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # damaged EXIF raises in many ways; viewers ignore it
        return None


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image with its 16 bits reduced to the upper 8, which Pillow would clip at 255 instead."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    return image


def decode_into_cache(source: ImageFiles, decoder: Decoder, folder: Path, progress: bool) -> np.ndarray:
    """The decoded images, mapped from a cache file in `folder` that is made where it is missing or damaged.

    The mapping is copy-on-write, because PyTorch takes the memory of a tensor for writable. Processes that
    need the same file at the same time wait for the one that makes it.
    """
    about = [2, PIL.__version__, decoder.shape, decoder.size, [(n, source.stamps[n]) for n in source.names]]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = folder / f"{source.path.resolve().stem}-{digest}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        return _mapped(path, decoder.shape)
    with locked(path.with_suffix(".lock"), wait=True):
        with contextlib.suppress(OSError, ValueError, EOFError):  # another process may just have made it
            return _mapped(path, decoder.shape)
        remove_leftovers(folder, path.name)
        if progress:
            tqdm.write(f"{path}: {amount(decoder.bytes)} on disk for the decoded images", sys.stderr)
        with replacing(path) as (temporary,):
            images = np.lib.format.open_memmap(temporary, "w+", np.uint8, decoder.shape)
            _reserve(temporary)
            decoder.fill(images, progress)
            images.flush()
    return _mapped(path, decoder.shape)


def _reserve(path: Path) -> None:
    """Allocates the disk blocks of a file now: writing to a mapping on a full disk would kill the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve
                raise


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array uint8 of this shape in a file, mapped; ValueError if the file holds another array."""
    with open_regular(path, math.inf) as file:
        images = np.load(name_of(file, path), mmap_mode="c", allow_pickle=False)
    if images.shape != shape or images.dtype != np.uint8 or not images.flags.c_contiguous:
        raise ValueError(f"{path} holds something else")
    return images
