"""The samplers, each a function that returns a step table."""

from .table import SAMPLERS, SpacingWarning, StepTable, ddim, ddpm, dpmpp_2m

__all__ = ["SAMPLERS", "SpacingWarning", "StepTable", "ddim", "ddpm", "dpmpp_2m"]
