// Attention by AMX, and its gradient in bfloat16: attention/attention_amx.cpp.
#pragma once

#include "attention/args.h"

namespace fused_diffusion {

// Whether the instruction set in use has AMX, and the kernel of the gradient serves so many positions.
bool amx_serves(int64_t positions);

// Instantiated for float, BFloat16 and Half, whose numbers are rounded to bfloat16.
template <class T>
void amx_attention(const AttentionArguments& g);

void amx_attention_gradient(const AttentionGradientArguments& g);

}  // namespace fused_diffusion
