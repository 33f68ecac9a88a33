"""Helpers for all other layers: devices, memory, ranks, texts of errors and checks of arguments."""

from .modules import importing

__getattr__ = importing(__name__)
