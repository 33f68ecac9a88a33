"""Writes models in the formats of other projects: diffusers' folders, ONNX, and `torch.export`."""

from ..utils.modules import importing

__getattr__ = importing(__name__)
