// The arguments of fused_diffusion::reverse_step, checked once for the CPU and the CUDA kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "reverse_step.h"

namespace fused_diffusion {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class OutputType { float32, bfloat16, float16 };

// What a kernel needs; null pointers stand for None.
// `counter` is (step, seed, stream of step 0): the row is table[step], the noise stream is stream + step.
struct StepArguments {
  const float* x;
  const void* cond;  // of type output_type, like uncond
  const void* uncond;
  const float* x0_prev;
  const float* noise;
  const double* table;
  const int64_t* counter;
  const int64_t* sample_ids;
  float* x_next;
  float* x0;
  int64_t batch, elements, rows;
  bool learned_variance;  // a sample of cond and uncond then holds 2 * elements
  OutputType output_type;
};

inline OutputType output_type(const Tensor& model_output) {
  const ScalarType dtype = model_output.scalar_type();
  if (dtype == ScalarType::Float) return OutputType::float32;
  if (dtype == ScalarType::BFloat16) return OutputType::bfloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, "model_output must be float32, bfloat16 or float16");
  return OutputType::float16;
}

inline void check_float(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.numel() == like.numel() && tensor.device() == like.device(),
                  name, " must be contiguous float32 of x's shape, on x's device");
}

template <class T>
inline const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
inline const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

template <class Launch>
std::tuple<Tensor, Tensor> checked_step(const Tensor& x, const Tensor& model_output,
                                        const std::optional<Tensor>& uncond,
                                        const std::optional<Tensor>& x0_prev,
                                        const std::optional<Tensor>& noise, const Tensor& table,
                                        const Tensor& counter, const Tensor& sample_ids,
                                        const Launch& launch) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must be [B, C, ...]");
  check_float(x, x, "x");
  if (x0_prev.has_value()) check_float(*x0_prev, x, "x0_prev");
  if (noise.has_value()) check_float(*noise, x, "noise");
  STD_TORCH_CHECK(model_output.dim() == x.dim() && model_output.is_contiguous() &&
                      model_output.device() == x.device() && model_output.size(0) == x.size(0) &&
                      (model_output.numel() == x.numel() ||
                       (model_output.numel() == 2 * x.numel() && model_output.size(1) == 2 * x.size(1))),
                  "model_output must be contiguous [B, C, ...] or [B, 2C, ...], on x's device");
  if (uncond.has_value()) {
    STD_TORCH_CHECK(uncond->scalar_type() == model_output.scalar_type() && uncond->is_contiguous() &&
                        uncond->numel() == model_output.numel() && uncond->device() == x.device(),
                    "model_output_uncond must be contiguous and match model_output");
  }
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Double && table.dim() == 2 && table.is_contiguous() &&
                      table.size(0) >= 1 && table.size(1) == kRowLength && table.device() == x.device(),
                  "table must be contiguous float64 [rows, 12] with at least one row, on x's device");
  STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Long && counter.numel() == 3 &&
                      counter.is_contiguous() && counter.device() == x.device(),
                  "counter must be contiguous int64 [3]: step, seed, stream; on x's device");
  STD_TORCH_CHECK(sample_ids.scalar_type() == ScalarType::Long && sample_ids.dim() == 1 &&
                      sample_ids.size(0) == x.size(0) && sample_ids.is_contiguous() &&
                      sample_ids.device() == x.device(),
                  "sample_ids must be contiguous int64 [B], on x's device");

  const OutputType type = output_type(model_output);
  Tensor x_next = torch::stable::empty_like(x), x0 = torch::stable::empty_like(x);
  const int64_t batch = x.size(0);
  if (x.numel() > 0) {
    launch(StepArguments{data<float>(x), model_output.const_data_ptr(),
                         uncond.has_value() ? uncond->const_data_ptr() : nullptr,
                         data<float>(x0_prev), data<float>(noise), data<double>(table),
                         data<int64_t>(counter), data<int64_t>(sample_ids),
                         static_cast<float*>(x_next.mutable_data_ptr()),
                         static_cast<float*>(x0.mutable_data_ptr()), batch, x.numel() / batch, table.size(0),
                         model_output.size(1) != x.size(1), type});
  }
  return {x_next, x0};
}

}  // namespace fused_diffusion
