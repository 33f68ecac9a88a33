"""biased_sum_ as a torch.library operator, and in plain PyTorch."""

import torch
from torch import Tensor

from ..._library import define

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_biased_sum_ = define(
    "biased_sum_",
    "(Tensor x, Tensor? bias, Tensor? residual, Tensor(a!) out, Tensor(b!)? copy, int scale) -> ()",
)


def biased_sum_(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    copy: Tensor | None = None,
    scale: int = 1,
) -> None:
    """out = x + bias + residual, rounded once, and the same numbers in `copy`.

    x, residual: [N, C, H, W] of one dtype of DTYPES, channels_last or a range of the channels of such a
    tensor. bias: [C] of that dtype. scale: 1, or 2 to write each pixel as 2 x 2. out, copy: like x, of
    [N, C, scale * H, scale * W]; with scale 1 they may be x or residual.
    """
    if x.is_cuda:
        return _biased_sum_(x, bias, residual, out, copy, scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.to(wide)
    if bias is not None:
        total = total + bias.to(wide)[:, None, None]
    if residual is not None:
        total = total + residual.to(wide)
    if scale == 2:
        total = total.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    out.copy_(total)
    if copy is not None:
        copy.copy_(total)
    return None
