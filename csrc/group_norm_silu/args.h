// The arguments of group_norm_silu and of its gradient, checked once for the CPU and the CUDA kernels.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "common/channels_last.h"
#include "group_norm_silu/math.h"

namespace fused_diffusion {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxCudaGroupSize = 1024;  // channels whose numbers fit in shared memory on every device

// A vector [C] or matrix [N, C] of float32, bfloat16 or float16, read as float32. Without data, all its numbers are
// `otherwise`.
struct Parameter {
  const void* data;
  ScalarType type;
  int64_t row, column;  // strides
  float otherwise;

  // Channels first to first + count of sample n.
  FD_HD void copy(int64_t n, int64_t first, int64_t count, float* __restrict to) const {
    const int64_t at = n * row + first * column;
    if (data == nullptr) {
      for (int64_t i = 0; i < count; ++i) to[i] = otherwise;
    } else if (type == ScalarType::Float) {
      copy_from(static_cast<const float*>(data) + at, count, to);
    } else if (type == ScalarType::BFloat16) {
      copy_from(static_cast<const BFloat16*>(data) + at, count, to);
    } else {
      copy_from(static_cast<const Half*>(data) + at, count, to);
    }
  }

  FD_HD float at(int64_t n, int64_t c) const {
    float value;
    copy(n, c, 1, &value);
    return value;
  }

 private:
  template <class T>
  FD_HD void copy_from(const T* from, int64_t count, float* __restrict to) const {
    if (column == 1) {
      for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i * column]);
    }
  }
};

// x is [N, C, P] if contiguous, [N, P, C] if channels_last, with positions `pixel` elements apart.
struct NormArguments {
  const void* x;
  Parameter weight, bias, add, scale, shift;
  double* mean;  // [N, G], as is rstd; both may be null
  float* rstd;
  int64_t samples, channels, positions, groups, pixel;
  double eps;
  bool channels_last, silu;
  bool bounded;  // whether to compute the extremes of x too; in channels_last only
  ScalarType type;

  FD_HD int64_t group_size() const { return channels / groups; }
};

inline bool is_float16_or_32(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

inline Parameter parameter(const std::optional<Tensor>& tensor, const Tensor& x, bool matrix, float otherwise,
                           const char* name) {
  if (!tensor.has_value()) return {nullptr, ScalarType::Float, 0, 0, otherwise};
  STD_TORCH_CHECK(is_float16_or_32(tensor->scalar_type()) && tensor->device() == x.device() &&
                      tensor->dim() == (matrix ? 2 : 1) && tensor->size(matrix ? 1 : 0) == x.size(1) &&
                      (!matrix || tensor->size(0) == x.size(0)),
                  name, " must be float32, bfloat16 or float16 ", matrix ? "[N, C]" : "[C]", ", on x's device");
  return {tensor->const_data_ptr(), tensor->scalar_type(), matrix ? tensor->stride(0) : 0,
          tensor->stride(matrix ? 1 : 0), otherwise};
}

inline NormArguments norm_arguments(const Tensor& x, int64_t groups, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias, const std::optional<Tensor>& add,
                                    const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, bool silu) {
  STD_TORCH_CHECK(x.dim() >= 2 && is_float16_or_32(x.scalar_type()),
                  "x must be float32, bfloat16 or float16 [N, C, ...]");
  STD_TORCH_CHECK(groups >= 1 && x.size(1) % groups == 0, x.size(1), " channels cannot be divided into ", groups,
                  " groups");
  NormArguments args{};
  args.x = x.const_data_ptr();
  args.channels_last = x.numel() > 0 && !x.is_contiguous();
  args.pixel = x.size(1);
  args.weight = parameter(weight, x, false, 1.0f, "weight");
  args.bias = parameter(bias, x, false, 0.0f, "bias");
  args.add = parameter(add, x, true, 0.0f, "add");
  args.scale = parameter(scale, x, true, 0.0f, "scale");
  args.shift = parameter(shift, x, true, 0.0f, "shift");
  args.samples = x.size(0);
  args.channels = x.size(1);
  args.positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) args.positions *= x.size(d);
  args.groups = groups;
  args.silu = silu;
  args.type = x.scalar_type();
  // A single position has both layouts. As contiguous, a row would have one number.
  if (args.positions == 1) args.channels_last = true;
  return args;
}

template <class Launch>
std::tuple<Tensor, Tensor, Tensor> checked_norm(const Tensor& x, int64_t groups, const std::optional<Tensor>& weight,
                                                const std::optional<Tensor>& bias, double eps,
                                                const std::optional<Tensor>& add, const std::optional<Tensor>& scale,
                                                const std::optional<Tensor>& shift, bool silu, const Launch& launch) {
  NormArguments args = norm_arguments(x, groups, weight, bias, add, scale, shift, silu);
  STD_TORCH_CHECK(!args.channels_last || is_channels_last(x), "x must be contiguous or channels_last");
  Tensor y = torch::stable::empty_like(x);
  Tensor mean = torch::stable::new_empty(x, {x.size(0), groups}, ScalarType::Double);
  Tensor rstd = torch::stable::new_empty(x, {x.size(0), groups}, ScalarType::Float);
  args.mean = static_cast<double*>(mean.mutable_data_ptr());
  args.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  args.eps = eps;
  if (x.numel() > 0) launch(args, y.mutable_data_ptr());
  return {y, mean, rstd};
}

inline void check_like(const Tensor& tensor, const Tensor& x, const char* name) {
  bool fits = tensor.dim() == x.dim() && tensor.scalar_type() == x.scalar_type() && tensor.device() == x.device();
  for (int64_t d = 0; fits && d < x.dim(); ++d) {
    fits = tensor.size(d) == x.size(d) && (x.size(d) == 1 || tensor.stride(d) == x.stride(d));
  }
  STD_TORCH_CHECK(fits || x.numel() == 0, name, " must have x's shape, dtype and strides");
}

inline void check_statistics(const Tensor& tensor, const Tensor& x, int64_t groups, ScalarType type, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == 2 && tensor.is_contiguous() &&
                      tensor.size(0) == x.size(0) && tensor.size(1) == groups && tensor.device() == x.device(),
                  name, " must be contiguous ", type == ScalarType::Double ? "float64" : "float32",
                  " [N, groups], on x's device");
}

// Input and outputs of the gradient's kernel; grad and dx have x's layout.
struct NormGradient {
  const void* grad;
  void* dx;
  float *sum_dz, *sum_dz_xhat, *sum_dx;  // [N, C]
};

template <class Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> checked_norm_gradient(
    const Tensor& grad, const Tensor& x, int64_t groups, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& add, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, bool silu, const Tensor& mean, const Tensor& rstd, const Launch& launch) {
  NormArguments args = norm_arguments(x, groups, weight, bias, add, scale, shift, silu);
  STD_TORCH_CHECK(!args.channels_last || is_channels_last(x), "x must be contiguous or channels_last");
  check_like(grad, x, "grad");
  check_statistics(mean, x, groups, ScalarType::Double, "mean");
  check_statistics(rstd, x, groups, ScalarType::Float, "rstd");
  args.mean = static_cast<double*>(const_cast<void*>(mean.const_data_ptr()));
  args.rstd = static_cast<float*>(const_cast<void*>(rstd.const_data_ptr()));
  Tensor dx = torch::stable::empty_like(x);
  const auto sums = [&] { return torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::Float); };
  Tensor sum_dz = sums(), sum_dz_xhat = sums(), sum_dx = sums();
  if (x.numel() > 0) {
    launch(args,
           NormGradient{grad.const_data_ptr(), dx.mutable_data_ptr(), static_cast<float*>(sum_dz.mutable_data_ptr()),
                        static_cast<float*>(sum_dz_xhat.mutable_data_ptr()),
                        static_cast<float*>(sum_dx.mutable_data_ptr())});
  } else {
    torch::stable::zero_(sum_dz);
    torch::stable::zero_(sum_dz_xhat);
    torch::stable::zero_(sum_dx);
  }
  return {dx, sum_dz, sum_dz_xhat, sum_dx};
}

}  // namespace fused_diffusion
