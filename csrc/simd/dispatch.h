// How the CPU runs an op: tiles of one sample, the instruction set chosen at run time, PyTorch's threads.
//
// A kernel is a struct with `template <class M> void run(int64_t begin, int64_t end) const` over tiles. All
// that it calls is always inlined, so the compiler vectorises the same lines once for each instruction set.
#pragma once

#include "common/parallel.h"
#include "philox/math.h"
#include "simd/instruction_sets.h"

namespace fused_diffusion {

constexpr int64_t kTileBlocks = 64;
constexpr int64_t kTile = 4 * kTileBlocks;
constexpr int64_t kTilesPerThread = 128;  // 32768 elements, like PyTorch: a smaller share is not worth a thread

// What a kernel calls as M: arithmetic, and the words of a tile of noise.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
struct Baseline : HardwareFma {
#else
struct Baseline : PortableFma {
#endif
  static FD_HD void words(uint32_t (&w)[4][kTileBlocks], uint32_t first, int64_t blocks, uint32_t stream,
                          uint64_t id, uint64_t seed) {
    for (int64_t i = 0; i < blocks; ++i) {
      const Words<uint32_t> block = philox_block(first + static_cast<uint32_t>(i), stream, id, seed);
      w[0][i] = block.w0;
      w[1][i] = block.w1;
      w[2][i] = block.w2;
      w[3][i] = block.w3;
    }
  }
};

template <class Kernel>
void run_baseline(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<Baseline>(begin, end);
}

#if defined(__x86_64__)
void philox_words_avx2(uint32_t* w, int64_t row, uint32_t first, int64_t blocks, uint32_t stream, uint64_t id,
                       uint64_t seed);  // philox/philox_avx2.cpp
void philox_words_avx512(uint32_t* w, int64_t row, uint32_t first, int64_t blocks, uint32_t stream, uint64_t id,
                         uint64_t seed);  // philox/philox_avx512.cpp

struct Avx2 : HardwareFma {
  static FD_HD void words(uint32_t (&w)[4][kTileBlocks], uint32_t first, int64_t blocks, uint32_t stream,
                          uint64_t id, uint64_t seed) {
    philox_words_avx2(w[0], kTileBlocks, first, blocks, stream, id, seed);
  }
};

struct Avx512 : HardwareFma {
  static FD_HD float from_word(uint32_t w) { return static_cast<float>(w); }

  static FD_HD void words(uint32_t (&w)[4][kTileBlocks], uint32_t first, int64_t blocks, uint32_t stream,
                          uint64_t id, uint64_t seed) {
    philox_words_avx512(w[0], kTileBlocks, first, blocks, stream, id, seed);
  }
};

template <class Kernel>
__attribute__((target("avx2,fma"))) void run_avx2(const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<Avx2>(begin, end);
}

template <class Kernel>
__attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))) void run_avx512(
    const Kernel& kernel, int64_t begin, int64_t end) {
  kernel.template run<Avx512>(begin, end);
}
#endif

template <class Kernel>
void run_tiles(const Kernel& kernel, int64_t tiles) {
  const Simd simd = simd_in_use();
  parallel_for(0, tiles, kTilesPerThread, [&](int64_t begin, int64_t end) {
#if defined(__x86_64__)
    if (simd >= Simd::avx512) return run_avx512(kernel, begin, end);
    if (simd == Simd::avx2) return run_avx2(kernel, begin, end);
#endif
    (void)simd;
    run_baseline(kernel, begin, end);
  });
}

// A tile: `size` elements from `first` on, of sample `sample`.
struct Tile {
  int64_t sample, first, size;
};

FD_HD int64_t tiles_per_sample(int64_t elements) { return (elements + kTile - 1) / kTile; }

FD_HD Tile tile_at(int64_t index, int64_t elements) {
  const int64_t tiles = tiles_per_sample(elements), first = index % tiles * kTile;
  return {index / tiles, first, elements - first < kTile ? elements - first : kTile};
}

// The normals of a tile, and up to 127 more, so that whole vectors are computed.
template <class M>
FD_HD void normal_tile(float* __restrict z, const Tile& tile, uint32_t stream, uint64_t id, uint64_t seed) {
  alignas(64) uint32_t w[4][kTileBlocks];
  alignas(64) float n[4][kTileBlocks];
  const int64_t blocks = (tile.size + 127) / 128 * 32;
  M::words(w, static_cast<uint32_t>(tile.first / 4), blocks, stream, id, seed);
  for (int64_t i = 0; i < blocks; ++i) box_muller<M>(w[0][i], w[1][i], n[0][i], n[1][i]);
  for (int64_t i = 0; i < blocks; ++i) box_muller<M>(w[2][i], w[3][i], n[2][i], n[3][i]);
  for (int64_t i = 0; i < blocks; ++i) {
    z[4 * i + 0] = n[0][i];
    z[4 * i + 1] = n[1][i];
    z[4 * i + 2] = n[2][i];
    z[4 * i + 3] = n[3][i];
  }
}

}  // namespace fused_diffusion
