// Tensors [N, C, H, W] in channels_last, as operators on images check them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fused_diffusion {

// The distance between the pixels of a channels_last tensor [N, C, H, W], or of a range of its channels.
inline int64_t pixel_distance(const torch::stable::Tensor& t, const char* name) {
  const int64_t width = t.size(3), height = t.size(2);
  const int64_t pixel = width > 1 ? t.stride(3) : height > 1 ? t.stride(2) : t.size(0) > 1 ? t.stride(0) : t.size(1);
  STD_TORCH_CHECK((t.size(1) <= 1 || t.stride(1) == 1) && pixel >= t.size(1) &&
                      (height <= 1 || t.stride(2) == width * pixel) &&
                      (t.size(0) <= 1 || t.stride(0) == height * width * pixel),
                  name, " must be channels_last, or a range of the channels of such a tensor");
  return pixel;
}

}  // namespace fused_diffusion
