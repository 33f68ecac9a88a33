"""The error bound for every backend, as an assertion."""

from torch import Tensor

from diffusion.kernels._tolerance import wrong


def assert_close(actual: Tensor, peer: Tensor, expected: Tensor, ulps: float = 4) -> None:
    """See diffusion.kernels._tolerance."""
    reason = wrong(actual, peer, expected, ulps)
    assert reason is None, reason
