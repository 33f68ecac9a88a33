// Memory for what a call computes on its way.
#pragma once

#include <cstdint>
#include <memory>

namespace fused_diffusion {

// A thread's buffer, kept from call to call: fresh pages cost more than small convolutions.
inline float* buffer(int64_t words, int which) {
  static thread_local std::unique_ptr<float[]> kept[4];
  static thread_local int64_t sizes[4] = {};
  if (sizes[which] < words + 16) {
    kept[which].reset();
    sizes[which] = 0;
    kept[which].reset(new float[words + 16]);
    sizes[which] = words + 16;
  }
  const uintptr_t line = (reinterpret_cast<uintptr_t>(kept[which].get()) + 63) / 64 * 64;
  return reinterpret_cast<float*>(line);
}

}  // namespace fused_diffusion
