"""`diffusion.steps`, the public name of the package `diffusion.samplers`: both are one module."""

import sys

from . import samplers

sys.modules[__name__] = samplers
