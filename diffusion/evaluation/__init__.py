"""Measures of models and samples: class accuracy, FID and similar distances, and the variational bound."""
