"""Judging models and their samples: accuracy, FID and its kind, and the variational bound."""
