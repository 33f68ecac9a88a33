"""Convolutions: conv2d with a derivative, and the fused one over packed weights that samples."""
