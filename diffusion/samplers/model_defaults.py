"""Checks of the options of samplers that a model has of its own."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

from ..process.noise_levels import NoiseLevels
from ..process.schedule import NoiseSchedule
from . import SAMPLERS, StepTable


def check_values(sampler: str, options: dict[str, Any], schedule: NoiseSchedule | NoiseLevels) -> None:
    """ValueError unless a sampler takes the values of its options, whatever the schedule and the steps."""
    try:
        if isinstance(schedule, NoiseLevels):
            SAMPLERS[sampler](schedule, prediction_type="sample", **options)
        elif {type(value) for value in options.values()} <= {str, bool, int, float}:
            _make_table(SAMPLERS[sampler], **options)
        else:
            _make_table.__wrapped__(SAMPLERS[sampler], **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sampler_options[{sampler!r}]: {error}") from None


def refuse_strength(options: dict[str, Any]) -> None:
    """ValueError for an option that belongs to an image, where a model says how it samples from noise."""
    if "strength" in options:
        raise ValueError("strength is no option of a model; give it to sample, with an image")


@lru_cache(typed=True)  # most models have the same options, and all T steps of a solver take 0.1 s
def _make_table(sampler: Callable[..., StepTable], **options: Any) -> None:
    # All T steps leave no room for an offset.
    sampler(_any_schedule(), 10 if options.get("steps_offset") else None, **options)


@cache
def _any_schedule() -> NoiseSchedule:
    return NoiseSchedule.linear()
