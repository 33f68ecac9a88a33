// Tensors [N, C, ...] in channels_last, as operators on images check them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fused_diffusion {

// The distance between the pixels of a channels_last tensor, or of a range of the channels of such a one.
inline int64_t pixel_distance(const torch::stable::Tensor& t, const char* name) {
  if (t.numel() == 0) return t.size(1);  // whose strides say nothing
  int64_t pixel = 0;
  for (int64_t d = t.dim() - 1; d >= 2 && pixel == 0; --d) pixel = t.size(d) <= 1 ? 0 : t.stride(d);
  if (pixel == 0) pixel = t.size(0) > 1 ? t.stride(0) : t.size(1);
  int64_t expected = pixel;
  bool even = t.size(1) <= 1 || t.stride(1) == 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    even = even && (t.size(d) <= 1 || t.stride(d) == expected);
    expected *= t.size(d);
  }
  STD_TORCH_CHECK(even && pixel >= t.size(1) && (t.size(0) <= 1 || t.stride(0) == expected),
                  name, " must be channels_last, or a range of the channels of such a tensor");
  return pixel;
}

}  // namespace fused_diffusion
