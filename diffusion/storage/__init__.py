"""Reading and writing files: models, images and shards, each replaced only once it is complete."""

from ..utils.modules import importing

__getattr__ = importing(__name__)
