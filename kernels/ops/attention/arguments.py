"""The arguments of attention, and which of them are valid."""

from typing import NamedTuple

from torch import Tensor

from ..._arguments import check_number, check_tensors


class Arguments(NamedTuple):
    """The arguments of the public function, except `backend`."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None = None

    def scale_or_default(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale


def validate(arguments: Arguments) -> None:
    q, k, v, scale = arguments
    check_tensors("attention", q=q, k=k, v=v)
    if scale is not None:
        check_number("scale", scale)
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        shapes = ", ".join(str(list(t.shape)) for t in (q, k, v))
        raise ValueError(f"attention needs q, k and v of one shape [B, heads, S, D], not {shapes}")
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(
            f"attention needs q, k and v of one floating-point dtype, not {q.dtype}, {k.dtype}, {v.dtype}"
        )
    for name, tensor in (("k", k), ("v", v)):
        if tensor.device != q.device:
            raise ValueError(f"attention: {name} is on {tensor.device}, not on q's {q.device}")
