"""DDPM, the model that users hold, and `load`, which finds a saved one."""

from .model import DDPM, load

__all__ = ["DDPM", "load"]
