"""DDPM, the model that users hold, and `load`, which finds a saved one.

The class is built in layers, a file for each: `conventions` has its attributes and its samplers, `execution`
runs its network, `sampling` and `inversion` are `sample` and `invert`, and `model` is the class, with its
loss and its storage.
"""

from .loading import load
from .model import DDPM

__all__ = ["DDPM", "load"]
