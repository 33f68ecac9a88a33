"""Linear attention, for planned networks: csrc/linear_attention/.

`library.linear_attention_` writes into a buffer and has no derivative. It is not a public op, so `OPS` is
empty.
"""

from ..._registry import InternalOp, PublicOp

__all__: list[str] = []
OPS: tuple[PublicOp, ...] = ()
INTERNAL = (InternalOp("linear_attention_"),)
