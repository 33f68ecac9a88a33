"""Training: recipes, the trainer, its optimizers, its saved state and the loop around it."""
