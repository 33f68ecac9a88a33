"""What a group normalisation does to each channel, for an op that applies it to what it reads:
csrc/group_norm_silu/norm_cpu.h."""

import torch

SCHEMA = (
    "(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, Tensor? add, Tensor? scale, "
    "Tensor? shift, bool silu, Tensor(a!) map) -> ()"
)

# x: [N, C, ...] in channels_last, or a range of the channels of such a tensor. map: float32 [3, N, C] or
# [4, N, C], of which the op makes (x - map[0]) * map[1] + map[2] what goes into the activation; map[1] and
# map[2] times -log2(e) where that is SiLU. map[3]: what the magnitudes of a channel do not exceed after it.
torch.library.define("fused_diffusion::group_norm_affine_", SCHEMA)


@torch.library.register_fake("fused_diffusion::group_norm_affine_")
def _fake(x, num_groups, weight, bias, eps, add, scale, shift, silu, map) -> None:
    return None


group_norm_affine_ = torch.ops.fused_diffusion.group_norm_affine_
