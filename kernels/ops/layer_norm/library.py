"""layer_norm_ as a torch.library operator."""

from ..._library import define

# x, out: [N, C, ...] of one dtype, float32, bfloat16 or float16, channels_last or a range of the channels
# of such a tensor; out may be x or residual. A sequence [B, S, C] is x = sequence.transpose(1, 2). weight,
# bias: float32 [C].
#
# rms false: out = (x - mean) / sqrt(variance + eps) * weight + bias over the channels of each pixel (Ba et
# al. 2016, arXiv:1607.06450). rms true: out = x / sqrt(mean(x^2) + eps) * weight + bias (Zhang & Sennrich
# 2019, arXiv:1910.07467); F.normalize(x, dim=1) * g * sqrt(C) is the same for weight = g and
# eps = 1e-24 / C, but for pixels whose norm is about 1e-12.
#
# scale, shift: float32 [N, C], neighbouring channels: then y = out * (1 + scale) + shift. silu: then
# y = silu(y). residual: as x; then out = y + residual.
layer_norm_ = define(
    "layer_norm_",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, bool rms, Tensor(a!) out, "
    "Tensor? scale=None, Tensor? shift=None, bool silu=False, Tensor? residual=None) -> ()",
)
