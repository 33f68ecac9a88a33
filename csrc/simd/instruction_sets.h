// The instruction sets that this processor has, and the one in use.
#pragma once

namespace fused_diffusion {

enum class Simd { baseline, avx2, avx512, avx512_bf16, amx };
constexpr const char* kSimdNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx"};

Simd best_simd();          // the widest that both this library and the processor have
Simd simd_in_use();        // best_simd(), unless use_simd chose another
void use_simd(Simd simd);  // from now on, in every thread; at most best_simd()

}  // namespace fused_diffusion
