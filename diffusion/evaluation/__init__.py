"""Measures of models and their samples: class accuracy, FID and its kind, and the variational bound."""
