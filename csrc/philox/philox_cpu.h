// philox_normal on one instruction set, for philox/philox.cpp.

#include "philox/noise_cpu.h"

// Items: chunks.
inline void write_normals(const PhiloxNormal& g, int64_t begin, int64_t end) {
  alignas(64) float z[kChunkElements];
  for (int64_t index = begin; index < end; ++index) {
    const Chunk chunk = chunk_at(index, g.elements);
    normal_chunk(z, chunk, g.stream, static_cast<uint64_t>(g.sample_ids[chunk.sample]), g.seed);
    memcpy(g.out + chunk.sample * g.elements + chunk.first, z, chunk.size * sizeof(float));
  }
}
