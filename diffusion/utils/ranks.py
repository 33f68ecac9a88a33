"""The rank of this process among several, from the environment variables that torchrun sets."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """The place of a process among those of one run.

    rank: number of this process, in 0..world_size-1. world_size: number of processes. local_rank: number of
    this process among those of its machine. ValueError for numbers out of range.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size or self.local_rank < 0:
            raise ValueError(
                f"rank {self.rank} of {self.world_size} (local rank {self.local_rank}) makes no sense; "
                "RANK must be in 0..WORLD_SIZE-1"
            )


def current_ranks() -> Ranks:
    """The ranks of RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets; a single one where they are not set.

    ValueError for a value that is not a whole number or is out of range, or if only one of RANK and
    WORLD_SIZE is set.
    """
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise ValueError("of RANK and WORLD_SIZE only one is set; torchrun sets both")
    values = {}
    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", os.environ.get("RANK", "0"))):
        text = os.environ.get(name, default)
        if not text.isdecimal():
            raise ValueError(f"{name} must be a whole number, not {text!r}")
        values[name.lower()] = int(text)
    return Ranks(**values)
