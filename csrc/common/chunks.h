// How elementwise ops on the CPU divide a batch of samples: chunks of one sample that stay in the first cache.
#pragma once

#include "common/common.h"
#include "common/parallel.h"

namespace fused_diffusion {

constexpr int64_t kChunkBlocks = 64;                  // of four normals each: philox/math.h
constexpr int64_t kChunkElements = 4 * kChunkBlocks;  // at most
constexpr int64_t kChunksPerThread = 128;             // 32768 elements, like PyTorch: fewer are not worth a thread

// `size` elements of sample `sample`, from `first` on.
struct Chunk {
  int64_t sample, first, size;
};

FD_HD int64_t chunks_per_sample(int64_t elements) { return divide_up(elements, kChunkElements); }

// Chunk number `index` of a batch of samples of `elements` elements.
FD_HD Chunk chunk_at(int64_t index, int64_t elements) {
  const int64_t chunks = chunks_per_sample(elements), first = index % chunks * kChunkElements;
  return {index / chunks, first, elements - first < kChunkElements ? elements - first : kChunkElements};
}

}  // namespace fused_diffusion
