"""linear_attention_ as a torch.library operator."""

from ..._library import define

# Attention through a summary of all positions (Shen et al. 2018, arXiv:1812.01243), at a cost linear in their
# number S:
#
#     summary[d, e] = sum over s of softmax(k, over positions)[d, s] * v[e, s]
#     out[e, s] = scale * sum over d of softmax(q, over channels)[d, s] * summary[d, e]
#
# q, k: [N, heads, D, S] of one dtype, float32, bfloat16 or float16, with neighbouring channels; v, out:
# [N, heads, E, S], likewise. memory_k, memory_v: float32 [heads, D, M] and [heads, E, M], contiguous: more
# keys and values, of no position.
linear_attention_ = define(
    "linear_attention_",
    "(Tensor q, Tensor k, Tensor v, Tensor? memory_k, Tensor? memory_v, float scale, Tensor(a!) out) -> ()",
)
