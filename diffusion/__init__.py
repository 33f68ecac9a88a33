"""Fast sampling and training of pixel-space diffusion models with classifier-free guidance."""

__version__ = "0.1.0"
