// Attention of bfloat16, with its gradient, by AMX: attention/attention_amx.cpp.
#pragma once

#include "attention/args.h"

namespace fused_diffusion {

bool amx_attends(int64_t positions);  // whether the instruction set in use is AMX, and serves so many

void amx_attention(const AttentionArguments& g);
void amx_attention_gradient(const AttentionGradientArguments& g);

}  // namespace fused_diffusion
