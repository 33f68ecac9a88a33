"""The one rule for the error that a kernel may have."""

from torch import Tensor, finfo, float64


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def wrong(
    actual: Tensor, peer: Tensor, expected: Tensor, ulps: float = 4, accuracy: float = 0.0
) -> str | None:
    """Why `actual` is too far from `expected`, which is in float64; None where it is not.

    Its error may be twice that of `peer`, plus a few ulps, where `peer` is what PyTorch's own ops give in
    actual's dtype and an ulp is one of the largest expected value. In float64, where the formula itself
    rounds, the error may be 1e-10 of the largest value. accuracy: the error may be this share of the largest
    value besides, where an algorithm is documented to trade so much for speed.
    """
    if actual.shape != expected.shape:
        return f"its shape is {tuple(actual.shape)}, not {tuple(expected.shape)}"
    error = _largest(actual.double() - expected)
    if actual.dtype == float64:
        allowed = 1e-10 * _largest(expected)
    else:
        ulp = finfo(actual.dtype).eps * _largest(expected)
        allowed = 2 * _largest(peer.double() - expected) + ulps * ulp + accuracy * _largest(expected)
    return None if error <= allowed else f"its error is {error:.3g}, {allowed:.3g} allowed"
