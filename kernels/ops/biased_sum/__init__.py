"""Bias and residual after a convolution on a CUDA device, in one pass: csrc/biased_sum/.

`library.biased_sum_` writes into a buffer and has no derivative. It is not a public op, so `OPS` is empty.
"""

from ... import _native
from ..._registry import InternalOp, PublicOp

__all__: list[str] = []
OPS: tuple[PublicOp, ...] = ()
INTERNAL = (InternalOp("biased_sum_", "networks on CUDA devices", lambda: _native.CUDA_MISSING, "cuda"),)
