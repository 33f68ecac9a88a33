// A digest of memory, by which a later look tells whether anything in it was written.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace fused_diffusion {

class MemoryDigest {
 public:
  // regions: addresses and sizes in bytes. They must stay readable as long as the methods are called.
  explicit MemoryDigest(std::vector<std::pair<uintptr_t, int64_t>> regions);

  // Whether the memory holds what it held at first. It reads one of `parts` equal parts, number `part`, and a few lines
  // of each region; so every byte is read in `parts` calls. A change of one word is always seen, and one of
  // several words unless their digests collide by chance.
  bool holds(int64_t part, int64_t parts) const;

 private:
  struct Block {
    const char* data;
    int64_t size;
    uint64_t digest;
  };

  static void compute(std::vector<Block>& blocks);
  static bool same(const std::vector<Block>& blocks, int64_t first, int64_t step);

  std::vector<Block> blocks_, samples_;
};

}  // namespace fused_diffusion
