// The words of many blocks in vectors of 64-bit lanes. A file that includes this has declared
// `wide_product(Lanes, uint32_t)` for its vectors before, because templates look such functions up where they
// are defined.
#pragma once

#include "philox/math.h"

namespace fused_diffusion {

// Word k of blocks first .. first + blocks - 1 to w + k * row; `blocks` is a multiple of 32. `ramp` counts the
// lanes. Even and odd blocks are apart while they are computed, and merged where they are stored.
template <class Lanes>
FD_HD void philox_words(Lanes ramp, uint32_t* w, int64_t row, uint32_t first, int64_t blocks, uint32_t stream,
                        uint64_t id, uint64_t seed) {
  constexpr int64_t kMerged = sizeof(Lanes) / sizeof(uint32_t), kPairs = 2;
  const auto store = [](uint32_t* to, Lanes even, Lanes odd) {
    const Lanes merged = (even & uint64_t{0xFFFFFFFF}) | odd << 32;
    memcpy(to, &merged, sizeof(merged));
  };
  for (int64_t i = 0; i < blocks; i += kPairs * kMerged) {
    Words<Lanes> c[2 * kPairs];
    for (int64_t j = 0; j < 2 * kPairs; ++j) {
      const uint64_t block = first + static_cast<uint64_t>(i + j / 2 * kMerged + j % 2);
      c[j] = {2 * ramp + block, Lanes{} + uint64_t{stream}, Lanes{} + id, Lanes{} + (id >> 32)};
    }
    philox4x32(c, seed);
    for (int64_t j = 0; j < kPairs; ++j) {
      uint32_t* to = w + i + j * kMerged;
      store(to, c[2 * j].w0, c[2 * j + 1].w0);
      store(to + row, c[2 * j].w1, c[2 * j + 1].w1);
      store(to + 2 * row, c[2 * j].w2, c[2 * j + 1].w2);
      store(to + 3 * row, c[2 * j].w3, c[2 * j + 1].w3);
    }
  }
}

}  // namespace fused_diffusion
