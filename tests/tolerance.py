"""The one rule for how far a kernel may be from the truth."""

from torch import Tensor, finfo, float64


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_close(actual: Tensor, peer: Tensor, expected: Tensor, ulps: float = 4) -> None:
    """The error against `expected`, in float64, is at most twice that of `peer`, plus a few ulps.

    `peer` is what PyTorch's own ops give in actual's dtype. An ulp is one of the largest expected value. In
    float64, where the formula itself rounds, the error is at most 1e-10 of the largest value.
    """
    assert actual.shape == expected.shape
    if actual.dtype == float64:
        assert largest(actual - expected) <= 1e-10 * largest(expected)
        return
    ulp = finfo(actual.dtype).eps * largest(expected)
    assert largest(actual.double() - expected) <= 2 * largest(peer.double() - expected) + ulps * ulp
