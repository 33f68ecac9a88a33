"""Which of several processes this is, as torchrun tells each in its environment."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """rank: this process, in 0..world_size-1. world_size: how many there are. local_rank: on this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if self.world_size < 1 or not 0 <= self.rank < self.world_size or self.local_rank < 0:
            raise ValueError(
                f"rank {self.rank} of {self.world_size} (local rank {self.local_rank}) makes no sense; "
                "RANK must be in 0..WORLD_SIZE-1"
            )


def current() -> Ranks:
    """From RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets; one rank where they are not set.

    ValueError for what is no whole number or out of range, or for one of RANK and WORLD_SIZE alone.
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
