// fused_diffusion::average_pool_ on the CPU: averages of squares of pixels, or the pixels themselves, normalised and
// activated as they are read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/channels_last.h"
#include "common/parallel.h"
#include "convolution/args.h"
#include "group_norm_silu/math.h"
#include "runtime/recorded_calls.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 1 << 14;

#define FD_PER_ISA "convolution/average_pool_cpu.h"
#define FD_ISAS (FD_ISAS_FLOAT32 | FD_ISA_AVX512_BF16)
#include "simd/foreach_isa.inc"

using AverageRows = void (*)(const Convolution&, int64_t window, int64_t begin, int64_t end);

AverageRows kernel(ScalarType type) {
  const Simd isa = simd_in_use();
  if (type == ScalarType::Float) return FD_DISPATCH(isa, average_rows<float>);
  if (type == ScalarType::Half) return FD_DISPATCH(isa, average_rows<Half>);
#if defined(__x86_64__)
  if (includes(isa, Simd::avx512_bf16)) return avx512_bf16::average_rows<BFloat16>;
#endif
  return FD_DISPATCH(isa, average_rows<BFloat16>);
}

void average_pool_(const Tensor& x, const std::optional<Tensor>& affine, bool silu, int64_t window, Tensor out) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "x must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(window == 1 || window == 2, "window must be 1 or 2");
  STD_TORCH_CHECK(x.dim() == 4 && out.dim() == 4 && out.scalar_type() == type && x.size(0) == out.size(0) &&
                      x.size(1) == out.size(1) && x.size(2) / window == out.size(2) &&
                      x.size(3) / window == out.size(3),
                  "x must be [N, C, H, W], and out [N, C, H / window, W / window] of its dtype");
  Convolution g{};
  g.x = x.const_data_ptr();
  g.out = out.mutable_data_ptr();
  g.images = x.size(0), g.channels = x.size(1), g.height = x.size(2), g.width = x.size(3);
  g.out_height = out.size(2), g.out_width = out.size(3);
  g.silu = silu;
  STD_TORCH_CHECK(!silu || affine.has_value(), "without affine there is no activation");
  if (affine.has_value()) {
    STD_TORCH_CHECK(affine->scalar_type() == ScalarType::Float && affine->is_contiguous() && affine->dim() == 3 &&
                        (affine->size(0) == 3 || affine->size(0) == 4) && affine->size(1) == g.images &&
                        affine->size(2) == g.channels,
                    "affine must be contiguous float32 [3, N, C] or [4, N, C]");
    g.centre = static_cast<const float*>(affine->const_data_ptr());
    g.gain = g.centre + g.images * g.channels;
    g.offset = g.gain + g.images * g.channels;
  }
  if (out.numel() == 0) return;
  g.x_pixel = pixel_distance(x, "x");
  g.out_pixel = pixel_distance(out, "out");
  const AverageRows average = kernel(type);
  const auto call = [=] {
    divide_work(g.images * g.out_height, g.out_width * g.channels, kElementsPerThread,
                [&](int64_t begin, int64_t end) { average(g, window, begin, end); });
  };
  run_or_record(call, x, affine, out);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("average_pool_", TORCH_BOX(&fused_diffusion::average_pool_));
}
