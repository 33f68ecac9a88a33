// The normals of a chunk on one instruction set. Included after simd/vec.h.

#if FD_LANES > 4
typedef uint64_t Uint64 __attribute__((vector_size(4 * FD_LANES)));

#if FD_LANES == 16
FD_HD Uint64 wide_product(Uint64 words, uint32_t constant) {
  return (Uint64)_mm512_mul_epu32((__m512i)words, _mm512_set1_epi64(constant));
}
#else
FD_HD Uint64 wide_product(Uint64 words, uint32_t constant) {
  return (Uint64)_mm256_mul_epu32((__m256i)words, _mm256_set1_epi64x(constant));
}
#endif

#include "philox/rounds.h"

// w[k][i] is word k of block first + i; `blocks` is a multiple of 32. Blocks with even and with odd numbers are
// computed in vectors of their own, and merged where they are stored.
inline __attribute__((noinline)) void philox_words(uint32_t (&w)[4][kChunkBlocks], uint32_t first, int64_t blocks,
                                                   uint32_t stream, uint64_t id, uint64_t seed) {
  constexpr int64_t kMerged = sizeof(Uint64) / sizeof(uint32_t), kPairs = 2;
#if FD_LANES == 16
  const Uint64 lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7};
#else
  const Uint64 lane_numbers = {0, 1, 2, 3};
#endif
  const auto store_words = [](uint32_t* to, Uint64 even, Uint64 odd) FD_INLINE {
    const Uint64 merged = (even & uint64_t{0xFFFFFFFF}) | odd << 32;
    memcpy(to, &merged, sizeof(merged));
  };
  for (int64_t i = 0; i < blocks; i += kPairs * kMerged) {
    Words<Uint64> c[2 * kPairs];
    for (int64_t j = 0; j < 2 * kPairs; ++j) {
      const uint64_t block = first + static_cast<uint64_t>(i + j / 2 * kMerged + j % 2);
      c[j] = {2 * lane_numbers + block, Uint64{} + uint64_t{stream}, Uint64{} + id, Uint64{} + (id >> 32)};
    }
    philox4x32(c, seed);
    for (int64_t j = 0; j < kPairs; ++j) {
      const int64_t to = i + j * kMerged;
      store_words(w[0] + to, c[2 * j].w0, c[2 * j + 1].w0);
      store_words(w[1] + to, c[2 * j].w1, c[2 * j + 1].w1);
      store_words(w[2] + to, c[2 * j].w2, c[2 * j + 1].w2);
      store_words(w[3] + to, c[2 * j].w3, c[2 * j + 1].w3);
    }
  }
}
#else
FD_HD void philox_words(uint32_t (&w)[4][kChunkBlocks], uint32_t first, int64_t blocks, uint32_t stream, uint64_t id,
                        uint64_t seed) {
  for (int64_t i = 0; i < blocks; ++i) {
    const Words<uint32_t> block = philox_block(first + static_cast<uint32_t>(i), stream, id, seed);
    w[0][i] = block.w0;
    w[1][i] = block.w1;
    w[2][i] = block.w2;
    w[3][i] = block.w3;
  }
}
#endif

// z gets the chunk's normals, and up to 127 more, so that whole vectors are computed: it has room for kChunkElements.
FD_HD void normal_chunk(float* __restrict z, const Chunk& chunk, uint32_t stream, uint64_t id, uint64_t seed) {
  alignas(64) uint32_t w[4][kChunkBlocks];
  alignas(64) float n[4][kChunkBlocks];
  const int64_t blocks = divide_up(chunk.size, 128) * 32;
  philox_words(w, static_cast<uint32_t>(chunk.first / 4), blocks, stream, id, seed);
  for (int64_t i = 0; i < blocks; ++i) box_muller<Scalar>(w[0][i], w[1][i], n[0][i], n[1][i]);
  for (int64_t i = 0; i < blocks; ++i) box_muller<Scalar>(w[2][i], w[3][i], n[2][i], n[3][i]);
  for (int64_t i = 0; i < blocks; ++i) {
    z[4 * i + 0] = n[0][i];
    z[4 * i + 1] = n[1][i];
    z[4 * i + 2] = n[2][i];
    z[4 * i + 3] = n[3][i];
  }
}
