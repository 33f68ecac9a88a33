"""Recipes: what is trained and how, in numbers."""

from dataclasses import dataclass, field

from .schedule import NoiseSchedule


@dataclass(frozen=True)
class Recipe:
    """What is trained and how; everything that decides the resulting weights, but for the machine.

    steps: optimiser steps of batch_size images. learning_rate: reached after warmup_steps, then falling
    linearly to zero. ema_decay: of the averaged weights, which are what is kept. gradient_clip: largest
    norm of the whole gradient. label_dropout: share of labels replaced by the null label (Ho & Salimans
    2022, arXiv 2207.12598). loss_weighting: see `process.loss_weight`.
    """

    unet: dict = field(default_factory=dict)
    schedule: dict = field(default_factory=lambda: NoiseSchedule.cosine().to_config())
    prediction_type: str = "v_prediction"
    loss_weighting: str = "uniform"
    steps: int = 1000
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    label_dropout: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), not {getattr(self, name)}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, but is {self.warmup_steps}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step 0..steps-1."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        left = (self.steps - step) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * min(warm, left)


MNIST = Recipe(
    unet={
        "sample_size": 28,
        "in_channels": 1,
        "out_channels": 1,
        "channels": 16,
        "channel_mult": [1, 3, 6],
        "num_res_blocks": 1,
        "attention_levels": [2],
        "time_embed_dim": 128,
        "upsample": "plain",
        "norm_groups": 8,
        "num_classes": 10,
    },
    steps=11500,
    batch_size=64,
    learning_rate=2e-3,
)
RECIPES = {"mnist": MNIST}
