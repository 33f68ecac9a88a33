"""The UNet: its configuration, its blocks, and a check for alterations."""

from ..utils.modules import importing

__getattr__ = importing(__name__)
