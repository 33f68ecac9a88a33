"""The digits among the fixtures, and a stand-in for a model that returns them."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from diffusion.data import load_mnist
from diffusion.storage.images import to_float
from helpers.paths import FIXTURES

DATA = FIXTURES  # the first 256 digits of MNIST's training and of its test set


def read_digits(data_dir, split):
    """`load_mnist` of the digits beside the tests, from the idx files: torchvision is an extra."""
    if Path(data_dir) != DATA:
        return load_mnist(data_dir, split)
    stem = DATA / "MNIST" / "raw" / {"train": "train", "test": "t10k"}[split]
    images = np.fromfile(f"{stem}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.fromfile(f"{stem}-labels-idx1-ubyte", np.uint8, offset=8)
    return torch.from_numpy(images), torch.from_numpy(labels).long()


class FakeModel:
    """`draw(labels, guidance_scale)` in place of a diffusion model; remembers how it was called."""

    value_range, class_names = (-1.0, 1.0), None

    def __init__(self, draw, num_classes=10, shape=(1, 28, 28)):
        self.draw, self.num_classes, self.calls = draw, num_classes, []
        self.metadata = {"training": {"ema_decay": 0.99}}
        self.unet = SimpleNamespace(config=SimpleNamespace(in_channels=shape[0], image_shape=shape[1:]))

    def steps(self, sampler, steps, **options):
        """No step table: every sampler and number of steps is taken."""

    def sample(self, labels=None, *, num_samples=None, guidance_scale=1.0, **options):
        self.calls.append({"labels": labels, "guidance_scale": guidance_scale, **options})
        return self.draw([None] * num_samples if labels is None else labels, guidance_scale)


def real_digits(labels, guidance_scale):
    """One test digit for each label; any digit if the label is None."""
    images, classes = read_digits(DATA, "test")
    pools = {digit: (classes == digit).nonzero().flatten().tolist() for digit in range(10)}
    pools[None] = list(range(len(images)))
    turns = {label: itertools.cycle(pool) for label, pool in pools.items()}
    return to_float(images[[next(turns[label]) for label in labels]])
