"""The diffusion process: noise schedules, the forward process and the training targets."""

from ..utils.modules import importing

__getattr__ = importing(__name__)
