"""Named inputs of philox_normal, for the tests and the benchmarks."""

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """sample_ids of None are 0 .. B-1."""

    shape: tuple[int, ...]
    seed: int = 0
    sample_ids: tuple[int, ...] | None = None
    stream: int = 0

    def inputs(self, device: str | torch.device = "cpu") -> tuple[tuple, dict]:
        """Positional and keyword arguments of one call."""
        ids = None if self.sample_ids is None else torch.tensor(self.sample_ids, device=device)
        return (self.shape,), dict(seed=self.seed, sample_ids=ids, stream=self.stream, device=device)


CASES = {
    "mnist": Case((16, 1, 28, 28)),
    "cifar10": Case((8, 3, 32, 32), seed=1, stream=1000),
    "imagenet64": Case((8, 3, 64, 64), seed=9),
    "whole_tiles": Case((3, 256), seed=2),
    "odd": Case((5, 3, 7, 11), seed=3, stream=7),
    "one_element": Case((6, 1), seed=4),
    "vector": Case((9,), seed=5),
    "empty_batch": Case((0, 3, 4, 4)),
    "empty_sample": Case((4, 0, 4)),
    "large_seed": Case((2, 33), seed=2**64 - 1),
    "seed_above_int64": Case((2, 33), seed=2**63),
    "large_ids": Case((4, 100), sample_ids=(2**32 - 1, 2**32, 2**63 - 1, 0), seed=6),
    "repeated_ids": Case((3, 10), sample_ids=(7, 7, 7)),
    "last_stream": Case((2, 65), stream=2**32 - 1),
}

# The shapes of real models.
BENCHMARKED = ("mnist", "cifar10", "imagenet64")
