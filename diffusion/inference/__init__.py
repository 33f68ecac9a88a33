"""Running the reverse process: the sampling loop, its buffers and the network that it calls."""

from ..utils.modules import importing

__getattr__ = importing(__name__)
