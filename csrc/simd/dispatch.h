// For a .cpp file that compiles kernels once for each instruction set, by simd/foreach_isa.inc: the sets to name in
// FD_ISAS, and the choice among the compiled kernels at run time.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstring>
#include <type_traits>

#include "common/floats.h"
#include "simd/instruction_sets.h"
#include "simd/targets.h"

#define FD_ISA_BASELINE 1
#define FD_ISA_AVX2 2
#define FD_ISA_AVX512 4
#define FD_ISA_AVX512_BF16 8
#define FD_ISA_AMX 16
#define FD_ISAS_FLOAT32 (FD_ISA_BASELINE | FD_ISA_AVX2 | FD_ISA_AVX512)  // sets that differ for float32

// The expression in the widest namespace of FD_ISAS_FLOAT32 that the instruction set `isa` includes.
#if defined(__x86_64__)
#define FD_DISPATCH(isa, ...)                        \
  (includes(isa, Simd::avx512) ? avx512::__VA_ARGS__ \
   : includes(isa, Simd::avx2) ? avx2::__VA_ARGS__   \
                               : baseline::__VA_ARGS__)
#else
#define FD_DISPATCH(isa, ...) ((void)(isa), baseline::__VA_ARGS__)
#endif
