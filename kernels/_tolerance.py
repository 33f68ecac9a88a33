"""The error bound for every backend."""

from torch import Tensor, finfo, float64


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def wrong(
    actual: Tensor, peer: Tensor, expected: Tensor, ulps: float = 4, accuracy: float = 0.0
) -> str | None:
    """The reason why `actual` is too far from the float64 `expected`, or None if it is within the bound.

    The error may be twice the error of `peer`, plus a few ulps. `peer` is the result of PyTorch's own ops in
    actual's dtype; an ulp is that of the largest expected value. In float64 the formula itself rounds, so the
    error may be 1e-10 of the largest value. accuracy: further error, relative to the largest value, that the
    algorithm is documented to trade for speed.
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
