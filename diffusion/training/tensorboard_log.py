"""The log of a run for TensorBoard, beside log.csv."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def summary_writer() -> type[Any]:
    """PyTorch's writer of event files; ValueError if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f'logs for TensorBoard need tensorboard ({error}); pip install "fused-diffusion[tensorboard]"'
        ) from error
    return SummaryWriter


class TensorBoardLog:
    """Event files in a folder, which TensorBoard reads.

    logged: the step of the last entry that a resumed run keeps; TensorBoard hides later ones. ValueError if
    tensorboard is not installed.
    """

    def __init__(self, folder: Path, logged: int | None):
        self.writer = summary_writer()(folder, purge_step=None if logged is None else logged + 1)

    def add(self, step: int, **values: float | None) -> None:
        """Adds a value of each name; None for none."""
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def add_grid(self, step: int, path: Path) -> None:
        """Adds the picture in a file."""
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self.writer.add_image("samples", pixels, step, dataformats="HWC")
        self.writer.flush()
