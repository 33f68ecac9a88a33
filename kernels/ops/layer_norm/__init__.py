"""Layer norm and RMS norm over the channels of each pixel, for planned networks: csrc/layer_norm/.

`library.layer_norm_` writes into a buffer and has no derivative. It is not a public op, so `OPS` is empty.
"""

from ..._registry import InternalOp, PublicOp

__all__: list[str] = []
OPS: tuple[PublicOp, ...] = ()
INTERNAL = (InternalOp("layer_norm_"),)
