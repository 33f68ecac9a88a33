"""Measures of models and samples: class accuracy, FID and similar distances, and the variational bound."""

from ..utils.modules import importing

__getattr__ = importing(__name__)
