"""Sampling beside the alternatives of a user: python -m benchmarks.sampling."""
