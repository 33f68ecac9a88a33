// Philox words with AVX-512. The whole file is compiled for it, so nothing in it may be shared with other files.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#include <immintrin.h>

#include "common/common.h"

namespace fused_diffusion {
typedef uint64_t Lanes __attribute__((vector_size(64)));

FD_HD Lanes wide_product(Lanes words, uint32_t constant) {
  return reinterpret_cast<Lanes>(_mm512_mul_epu32(reinterpret_cast<__m512i>(words), _mm512_set1_epi64(constant)));
}
}  // namespace fused_diffusion

#include "philox/words.h"

namespace fused_diffusion {

void philox_words_avx512(uint32_t* w, int64_t row, uint32_t first, int64_t blocks, uint32_t stream, uint64_t id,
                         uint64_t seed) {
  philox_words(Lanes{0, 1, 2, 3, 4, 5, 6, 7}, w, row, first, blocks, stream, id, seed);
}

}  // namespace fused_diffusion
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
