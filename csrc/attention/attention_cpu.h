// Attention on one instruction set, for attention/attention.cpp.
//
// Queries lie in the lanes of vectors: the logits of a block are kept transposed, [keys][queries], so that keys and
// values are read in place, one broadcast number at a time, and the softmax needs no sum across lanes. So every query's
// arithmetic is the same whatever the width of a vector, and with multiply-adds that round once (fma, Float32Fma) its
// bits are too, except for bfloat16 where the processor multiplies pairs of it.

#include "simd/exp.h"
#include "simd/gemm.h"
#include "simd/lanes.h"
// transpose.h uses lanes.h.
#include "simd/transpose.h"

#if FD_BFLOAT16
// bfloat16 pairs for simd/gemm.h, with the rounding of weights to pairs.
struct WeightPairs : Bfloat16Pairs {
  // Lane i of the result is the pair (first[i], second[i]), rounded to bfloat16.
  static FD_HD Vec pair(Vec first, Vec second) {
    const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (Vec)_mm512_permutexvar_epi16(order, rounded);
  }

  // to[i] is the pair (value[2 i], value[2 i + 1]), rounded to bfloat16.
  static FD_HD void store_pairs(float* to, Vec value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)value));
  }
};
#endif

// c[rows][lanes] = or, with `add`, += lhs[rows][depth] b[depth][lanes]; lanes is a multiple of kLanes.
template <class Math>
__attribute__((noinline)) void multiply(StridedRows lhs, const float* b, int64_t b_step, float* c, int64_t c_row,
                                        int64_t rows, int64_t lanes, bool add) {
  multiply_panel<Math>(lhs, 0, rows, b, b_step, lanes, [&](int64_t row, int64_t lane, Vec sum) FD_INLINE {
    float* to = c + row * c_row + lane;
    store(to, add ? load(to) + sum : sum);
  });
}

#include "attention/pack_cpu.h"
// forward_cpu.h and backward_cpu.h use the copies of pack_cpu.h.
#include "attention/backward_cpu.h"
#include "attention/forward_cpu.h"

template <class T, class Math = Float32Fma>
AttentionKernels kernels_of() {
  return {forward<Math, T>, backward<Math, T>, add_partial_sums<T>, kLanes};
}
