// Attention in bfloat16 by AMX, and its gradient: attention/attention_amx.cpp.
#pragma once

#include "attention/args.h"

namespace fused_diffusion {

// Whether the instruction set in use has AMX, and the kernels serve so many positions.
bool amx_serves(int64_t positions);

void amx_attention(const AttentionArguments& g);
void amx_attention_gradient(const AttentionGradientArguments& g);

}  // namespace fused_diffusion
