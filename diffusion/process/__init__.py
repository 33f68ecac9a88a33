"""The diffusion process: noise schedules, the forward process and the training targets."""
