// Attention by AMX, and its gradient in bfloat16: attention/attention_amx.cpp.
#pragma once

#include "attention/args.h"

namespace fused_diffusion {

// Whether the instruction set in use has AMX, and the kernel of the gradient serves so many positions.
bool amx_serves(int64_t positions);

// Instantiated for float, BFloat16 and Half, whose numbers are rounded to bfloat16.
template <class T>
void amx_attention(const AttentionArguments& g);

// Limbs take less time than fused multiply-adds, unless most of a tile would be padding.
constexpr int64_t kMinLimbWidth = 16, kMaxLimbWidth = 1024, kMinLimbKeys = 128;
constexpr float kMaxLimbScale = 0x1p60f;

// Computes blocks of `queries` queries: AttentionKernels of attention/attention.cpp.
typedef void (*AttentionKernel)(const AttentionArguments&, int64_t queries, int64_t begin, int64_t end);

// With the accuracy of float32. other: for heads with NaN, infinity or numbers near them.
template <class T>
void amx_exact_attention(const AttentionArguments& g, AttentionKernel other);

void amx_attention_gradient(const AttentionGradientArguments& g);

}  // namespace fused_diffusion
