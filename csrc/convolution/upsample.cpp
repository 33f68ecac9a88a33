// fused_diffusion::upsample_nearest2x_ on the CPU: nearest-neighbour interpolation to twice the size, written to a
// given tensor, which may be some channels of a wider one.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>

#include "common/channels_last.h"
#include "common/parallel.h"
#include "runtime/recorded_calls.h"

namespace fused_diffusion {
namespace {

using torch::stable::Tensor;

constexpr int64_t kBytesPerThread = 1 << 16;

// Upsamples rows of pixels of all images; `size` bytes of each pixel. x_pixel, out_pixel: distances in bytes.
void upsample_rows(const char* x, int64_t x_pixel, char* out, int64_t out_pixel, int64_t width, int64_t size,
                   int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const char* from = x + row * width * x_pixel;
    char* to = out + 4 * row * width * out_pixel;
    for (int64_t column = 0; column < width; ++column, from += x_pixel, to += 2 * out_pixel) {
      for (char* pixel : {to, to + out_pixel, to + 2 * width * out_pixel, to + (2 * width + 1) * out_pixel}) {
        memcpy(pixel, from, size);
      }
    }
  }
}

void upsample_nearest2x_(const Tensor& x, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && x.scalar_type() == out.scalar_type() && x.size(0) == out.size(0) &&
                      x.size(1) == out.size(1) && 2 * x.size(2) == out.size(2) && 2 * x.size(3) == out.size(3),
                  "x must be [N, C, H, W], and out [N, C, 2 H, 2 W] of its dtype");
  if (x.numel() == 0) return;
  const int64_t element = x.element_size(), x_pixel = pixel_distance(x, "x") * element;
  const int64_t out_pixel = pixel_distance(out, "out") * element, size = x.size(1) * element;
  const int64_t rows = x.size(0) * x.size(2), width = x.size(3);
  const char* from = static_cast<const char*>(x.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const auto call = [=] {
    divide_work(rows, 4 * width * size, kBytesPerThread, [&](int64_t begin, int64_t end) {
      upsample_rows(from, x_pixel, to, out_pixel, width, size, begin, end);
    });
  };
  run_or_record(call, x, out);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("upsample_nearest2x_", TORCH_BOX(&fused_diffusion::upsample_nearest2x_));
}
