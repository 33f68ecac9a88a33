// The instruction sets for which kernels are compiled, those of this processor, and the one in use.
#pragma once

namespace fused_diffusion {

// An instruction set is the set of its features, a bit each. Kernels compiled for a set run on all that include it.
enum class Simd : unsigned {
  baseline = 0,
  avx2 = 1,                  // AVX2 and FMA
  avx512 = avx2 | 2,         // and AVX-512 F, BW, DQ and VL
  avx512_bf16 = avx512 | 4,  // and AVX512_BF16
  amx = avx512_bf16 | 8,     // and AMX with products of bfloat16 and of bytes
};

constexpr bool includes(Simd set, Simd subset) {
  return (static_cast<unsigned>(set) & static_cast<unsigned>(subset)) == static_cast<unsigned>(subset);
}

struct NamedSimd {
  const char* name;
  Simd set;
};
// In Python: kernels/_native.py.
constexpr NamedSimd kNamedSimd[] = {{"baseline", Simd::baseline},
                                    {"avx2", Simd::avx2},
                                    {"avx512", Simd::avx512},
                                    {"avx512_bf16", Simd::avx512_bf16},
                                    {"amx", Simd::amx}};

Simd best_simd();          // the widest that both this library and the processor have
Simd simd_in_use();        // best_simd(), unless use_simd chose another
void use_simd(Simd simd);  // from now on, in every thread; best_simd() must include it

}  // namespace fused_diffusion
