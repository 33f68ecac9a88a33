// Attention by AMX, for attention/attention_amx.cpp.

#include "amx/tile_gemm.h"
#include "simd/exp.h"

#include "attention/amx_rows.h"
// The files below use amx_rows.h.
#include "attention/amx_bfloat16.h"
#include "attention/amx_forward.h"
#include "attention/amx_gradient.h"
#include "attention/amx_limbs.h"
