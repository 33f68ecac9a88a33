// fused_diffusion::layer_norm_ on the CPU: layer norm (Ba et al. 2016, arXiv:1607.06450) or RMS norm (Zhang & Sennrich
// 2019, arXiv:1910.07467) over the channels of each pixel, with the modulation, SiLU and residual after it.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <type_traits>

#include "common/channels_last.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "runtime/recorded_calls.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kElementsPerThread = 1 << 15;  // like PyTorch: fewer are not worth a thread

// Rows are pixels; they are `x_row`, `out_row` and `residual_row` elements apart. All but x and out may be null.
struct LayerNorm {
  const void* x;
  void* out;
  const void* residual;
  const float *weight, *bias;  // [channels]
  const float *scale, *shift;  // [N, channels], images `scale_row` and `shift_row` apart
  int64_t rows, channels, x_row, out_row, residual_row, scale_row, shift_row;
  int64_t positions;  // rows of an image
  double eps;
  bool rms;  // whether the mean is taken to be 0
  bool silu;
};

#define FD_PER_ISA "layer_norm/layer_norm_cpu.h"
#define FD_ISAS (FD_ISAS_FLOAT32 | FD_ISA_AVX512_BF16)
#include "simd/foreach_isa.inc"

using NormaliseRows = void (*)(const LayerNorm&, int64_t begin, int64_t end);

NormaliseRows kernel(ScalarType type) {
  const Simd isa = simd_in_use();
  if (type == ScalarType::Float) return FD_DISPATCH(isa, normalise_rows<float>);
  if (type == ScalarType::Half) return FD_DISPATCH(isa, normalise_rows<Half>);
#if defined(__x86_64__)
  if (includes(isa, Simd::avx512_bf16)) return avx512_bf16::normalise_rows<BFloat16>;
#endif
  return FD_DISPATCH(isa, normalise_rows<BFloat16>);
}

const float* channel_values(const std::optional<Tensor>& values, const Tensor& x, const char* name) {
  if (!values.has_value()) return nullptr;
  STD_TORCH_CHECK(values->scalar_type() == ScalarType::Float && values->is_contiguous() && values->dim() == 1 &&
                      values->size(0) == x.size(1),
                  name, " must be contiguous float32 [C]");
  return static_cast<const float*>(values->const_data_ptr());
}

const float* image_values(const std::optional<Tensor>& values, const Tensor& x, const char* name, int64_t& row) {
  if (!values.has_value()) return nullptr;
  STD_TORCH_CHECK(values->scalar_type() == ScalarType::Float && values->dim() == 2 && values->size(0) == x.size(0) &&
                      values->size(1) == x.size(1) && (x.size(1) <= 1 || values->stride(1) == 1),
                  name, " must be float32 [N, C] with neighbouring channels");
  row = values->stride(0);
  return static_cast<const float*>(values->const_data_ptr());
}

bool is_alike(const Tensor& x, const Tensor& other) {
  bool alike = x.dim() >= 2 && other.dim() == x.dim() && other.scalar_type() == x.scalar_type();
  for (int64_t d = 0; alike && d < x.dim(); ++d) alike = x.size(d) == other.size(d);
  return alike;
}

void layer_norm_(const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps,
                 bool rms, Tensor out, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                 bool silu, const std::optional<Tensor>& residual) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "x must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(is_alike(x, out), "x and out must be [N, C, ...] of one shape and dtype");
  STD_TORCH_CHECK(!residual.has_value() || is_alike(x, *residual), "residual must have the shape and dtype of x");
  LayerNorm args{};
  args.weight = channel_values(weight, x, "weight");
  args.bias = channel_values(bias, x, "bias");
  args.scale = image_values(scale, x, "scale", args.scale_row);
  args.shift = image_values(shift, x, "shift", args.shift_row);
  args.eps = eps;
  args.rms = rms;
  args.silu = silu;
  if (x.numel() == 0) return;
  args.x = x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  args.channels = x.size(1);
  args.rows = x.numel() / x.size(1);
  args.positions = args.rows / x.size(0);
  args.x_row = pixel_distance(x, "x");
  args.out_row = pixel_distance(out, "out");
  if (residual.has_value()) {
    args.residual = residual->const_data_ptr();
    args.residual_row = pixel_distance(*residual, "residual");
  }
  const NormaliseRows normalise = kernel(type);
  const auto call = [=] {
    divide_work(args.rows, args.channels, kElementsPerThread,
                [&](int64_t begin, int64_t end) { normalise(args, begin, end); });
  };
  run_or_record(call, x, weight, bias, out, scale, shift, residual);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) { m.impl("layer_norm_", TORCH_BOX(&fused_diffusion::layer_norm_)); }
