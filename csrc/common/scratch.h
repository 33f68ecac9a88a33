// Buffers of a thread for intermediate results.
#pragma once

#include <cstdint>
#include <memory>

namespace fused_diffusion {

// The calling thread's buffer number `which`, 0 to 3: at least `floats` floats, aligned to a cache line. It is kept
// from call to call, because fresh pages cost more than a small op, and is overwritten by the next call for the same
// number.
inline float* buffer(int64_t floats, int which) {
  static thread_local std::unique_ptr<float[]> kept[4];
  static thread_local int64_t sizes[4] = {};
  if (sizes[which] < floats + 16) {
    kept[which].reset();
    sizes[which] = 0;
    kept[which].reset(new float[floats + 16]);
    sizes[which] = floats + 16;
  }
  const uintptr_t line = (reinterpret_cast<uintptr_t>(kept[which].get()) + 63) / 64 * 64;
  return reinterpret_cast<float*>(line);
}

// Arrays one after another in the calling thread's buffer 0, each aligned to a cache line.
class ScratchArrays {
 public:
  // floats: of all arrays together; at most kMaxArrays of them.
  explicit ScratchArrays(int64_t floats) : next_(buffer(floats + kLineFloats * kMaxArrays, 0)) {}

  float* take(int64_t floats) {
    float* taken = next_;
    next_ += (floats + kLineFloats - 1) / kLineFloats * kLineFloats;
    return taken;
  }

 private:
  static constexpr int64_t kMaxArrays = 16, kLineFloats = 16;
  float* next_;
};

}  // namespace fused_diffusion
