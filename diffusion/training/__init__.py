"""Training: recipes, the trainer, its optimizers, its saved state and the loop around it."""

from ..utils.modules import importing

__getattr__ = importing(__name__)
