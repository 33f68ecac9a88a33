"""What a group normalisation does to each channel, for an op that applies it to what it reads:
csrc/group_norm_silu/norm_cpu.h."""

import torch

SCHEMA = (
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, bool silu, Tensor(a!) affine) -> ()"
)

# x: [N, C, ...] in channels_last, or a range of the channels of such a tensor. affine: float32 [3, N, C] or
# [4, N, C]: centre, gain, offset and bound. (x - centre) * gain + offset is the activation's input, or that
# times -log2(e) where the activation is SiLU; a channel's magnitudes after it are at most bound.
torch.library.define("fused_diffusion::group_norm_affine_", SCHEMA)


@torch.library.register_fake("fused_diffusion::group_norm_affine_")
def _fake(x, num_groups, weight, bias, eps, add, scale, shift, silu, affine) -> None:
    return None


group_norm_affine_ = torch.ops.fused_diffusion.group_norm_affine_
