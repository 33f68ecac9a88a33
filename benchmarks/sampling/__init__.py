"""Whole chains against what one would use instead: python -m benchmarks.sampling."""
