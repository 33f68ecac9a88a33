// Memory layouts of tensors [N, C, ...], as ops on images check them: channels_last, which some ops need, and others.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace fused_diffusion {

// The distance between the pixels of a channels_last tensor, or of a range of the channels of such a tensor.
inline int64_t pixel_distance(const torch::stable::Tensor& t, const char* name) {
  if (t.numel() == 0) return t.size(1);  // strides of an empty tensor are arbitrary
  int64_t pixel = 0;
  for (int64_t d = t.dim() - 1; d >= 2 && pixel == 0; --d) pixel = t.size(d) <= 1 ? 0 : t.stride(d);
  if (pixel == 0) pixel = t.size(0) > 1 ? t.stride(0) : t.size(1);
  int64_t expected = pixel;
  bool even = t.size(1) <= 1 || t.stride(1) == 1;
  for (int64_t d = t.dim() - 1; d >= 2; --d) {
    even = even && (t.size(d) <= 1 || t.stride(d) == expected);
    expected *= t.size(d);
  }
  STD_TORCH_CHECK(even && pixel >= t.size(1) && (t.size(0) <= 1 || t.stride(0) == expected), name,
                  " must be channels_last, or a range of the channels of such a tensor");
  return pixel;
}

// Whether a tensor that is not empty is channels_last, all of its memory used.
inline bool is_channels_last(const torch::stable::Tensor& x) {
  int64_t expected = x.size(1);
  for (int64_t d = x.dim() - 1; d >= 2; --d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return (x.size(1) == 1 || x.stride(1) == 1) && (x.size(0) <= 1 || x.stride(0) == expected);
}

// Strides of an image [C, ...] in elements: contiguous, channels_last, or channels of a wider tensor.
struct ImageLayout {
  int64_t sample, channel, position;
};

// The layout of [B, C, ...], if its positions are equally far apart.
inline ImageLayout image_layout(const torch::stable::Tensor& tensor, const char* name) {
  if (tensor.numel() == 0) return {0, 0, 1};  // strides of an empty tensor are arbitrary
  ImageLayout layout{tensor.stride(0), tensor.stride(1), 1};
  int64_t expected = 0, positions = 1;
  for (int64_t d = tensor.dim() - 1; d >= 2; --d) {
    positions *= tensor.size(d);
    if (tensor.size(d) == 1) continue;
    if (expected == 0) expected = layout.position = tensor.stride(d);
    STD_TORCH_CHECK(tensor.stride(d) == expected, name, " must be contiguous or channels_last");
    expected *= tensor.size(d);
  }
  if (tensor.size(1) == 1) layout.channel = positions * layout.position;
  return layout;
}

}  // namespace fused_diffusion
