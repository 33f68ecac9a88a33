"""The planner: a network as a graph of torch functions, and a plan that computes it with the compiled ops."""

from ..utils.modules import importing

__getattr__ = importing(__name__)
