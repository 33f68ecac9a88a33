// Attention by AMX, for attention/attention_amx.cpp.

#include "amx/tile_gemm.h"
#include "simd/exp.h"

#include "attention/amx_forward.h"
#include "attention/amx_gradient.h"
