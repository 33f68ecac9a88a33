// Digests of memory: multiplications and shifts of 64-bit words, of samples of every region and of all bytes in turn.
#include "runtime/memory_digest.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "common/parallel.h"

namespace fused_diffusion {
namespace {

constexpr int64_t kBlockBytes = 1 << 14;
constexpr int64_t kBytesPerThread = 1 << 18;
constexpr int64_t kSampleBytes = 64, kSamples = 4;  // of each region
constexpr int kSums = 8;                            // independent ones, whose multiplications overlap

// Differences move up by the multiplication and down by the shift; both steps can be undone, so none is lost.
uint64_t mixed(uint64_t word) {
  word *= 0x9E3779B97F4A7C15;
  return word ^ word >> 32;
}

uint64_t digest_of(const char* data, int64_t size) {
  constexpr int64_t kStep = kSums * sizeof(uint64_t);
  uint64_t sums[kSums];
  for (int i = 0; i < kSums; ++i) sums[i] = i;
  const auto add = [&](const char* from) {
    uint64_t words[kSums];
    memcpy(words, from, kStep);
    for (int i = 0; i < kSums; ++i) sums[i] = mixed(sums[i] ^ words[i]);
  };
  int64_t at = 0;
  for (; at + kStep <= size; at += kStep) add(data + at);
  char rest[kStep] = {};
  memcpy(rest, data + at, size - at);
  add(rest);
  uint64_t digest = 0;
  for (uint64_t sum : sums) digest = mixed(digest ^ sum);
  return digest;
}

}  // namespace

MemoryDigest::MemoryDigest(std::vector<std::pair<uintptr_t, int64_t>> regions) {
  for (const auto& [address, size] : regions) {
    const char* data = reinterpret_cast<const char*>(address);
    for (int64_t at = 0; at < size; at += kBlockBytes) {
      blocks_.push_back({data + at, std::min(size - at, kBlockBytes), 0});
    }
    for (int64_t i = 0; i < kSamples && size > 0; ++i) {
      const int64_t at = std::max<int64_t>(0, size - kSampleBytes) * i / (kSamples - 1);
      samples_.push_back({data + at, std::min(size - at, kSampleBytes), 0});
    }
  }
  compute(blocks_);
  compute(samples_);
}

void MemoryDigest::compute(std::vector<Block>& blocks) {
  divide_work(static_cast<int64_t>(blocks.size()), kBlockBytes, kBytesPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) blocks[i].digest = digest_of(blocks[i].data, blocks[i].size);
  });
}

bool MemoryDigest::same(const std::vector<Block>& blocks, int64_t first, int64_t step) {
  const int64_t count = static_cast<int64_t>(blocks.size());
  std::atomic<bool> same{true};
  const int64_t looked_at = count > first ? (count - first - 1) / step + 1 : 0;
  divide_work(looked_at, kBlockBytes, kBytesPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end && same.load(std::memory_order_relaxed); ++i) {
      const Block& block = blocks[first + i * step];
      if (digest_of(block.data, block.size) != block.digest) same = false;
    }
  });
  return same;
}

bool MemoryDigest::holds(int64_t part, int64_t parts) const {
  if (parts > 1 && !same(samples_, 0, 1)) return false;
  return same(blocks_, part, parts);
}

}  // namespace fused_diffusion
