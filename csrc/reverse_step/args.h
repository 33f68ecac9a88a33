// The arguments of the reverse step's ops, checked once for the CPU and the CUDA kernel.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "common/channels_last.h"
#include "reverse_step/math.h"

namespace fused_diffusion {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Type { float32, bfloat16, float16 };

// The arguments of a kernel; null pointers stand for None. x and x_next may be the same memory, as may x0_prev and x0.
// counter: step, seed, noise stream of step 0, and the number of CUDA blocks that have finished this step. The row is
// table[step], the noise stream is stream + step.
struct StepArguments {
  const float* x;
  const void* cond;  // of type output_type and layout output, like uncond
  const void* uncond;
  const float* x0_prev;
  const float* noise;
  const double* table;
  int64_t* counter;
  const int64_t* sample_ids;
  float* x_next;
  float* x0;
  void* unet_input;  // of type input_type and layout input: the batch, `replicas` times
  int64_t batch, channels, positions, rows, replicas;
  ImageLayout output, input;
  Type output_type, input_type;
  bool learned_variance;  // cond and uncond then hold 2 * channels
  bool has_x0_prev;       // separate, because x0_prev is also null for an empty x
  bool in_place;          // whether the counter's step is incremented
};

inline Type type_of(const Tensor& tensor, const char* name) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return Type::float32;
  if (dtype == ScalarType::BFloat16) return Type::bfloat16;
  STD_TORCH_CHECK(dtype == ScalarType::Half, name, " must be float32, bfloat16 or float16");
  return Type::float16;
}

inline void check_float(const Tensor& tensor, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.numel() == like.numel() && tensor.device() == like.device(),
                  name, " must be contiguous float32 of x's shape, on x's device");
}

// Checks for [B, C, ...] or, by max_replicas and `wider`, [2B, C, ...] or [B, 2C, ...], where x is [B, C, ...].
inline void check_images(const Tensor& tensor, const Tensor& x, int64_t max_replicas, bool wider, const char* name) {
  bool fits = tensor.dim() == x.dim() && tensor.device() == x.device();
  for (int64_t d = 0; fits && d < x.dim(); ++d) {
    const int64_t size = tensor.size(d);
    fits = d == 0   ? size == x.size(0) || size == max_replicas * x.size(0)
           : d == 1 ? size == x.size(1) || (wider && size == 2 * x.size(1))
                    : size == x.size(d);
  }
  STD_TORCH_CHECK(fits, name, " must be [B, C, ...]", max_replicas > 1 ? ", [2B, C, ...]" : "",
                  wider ? " or [B, 2C, ...]" : "", ", on x's device");
}

template <class T>
inline const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
inline const T* data(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

inline StepArguments checked_arguments(const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& uncond,
                                       const std::optional<Tensor>& noise, const Tensor& table, const Tensor& counter,
                                       const Tensor& sample_ids) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must be [B, C, ...]");
  check_float(x, x, "x");
  if (noise.has_value()) check_float(*noise, x, "noise");
  check_images(model_output, x, 1, true, "model_output");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Double && table.dim() == 2 && table.is_contiguous() &&
                      table.size(0) >= 1 && table.size(1) == kRowLength && table.device() == x.device(),
                  "table must be contiguous float64 [rows, 12] with at least one row, on x's device");
  STD_TORCH_CHECK(counter.scalar_type() == ScalarType::Long && counter.numel() == 4 && counter.is_contiguous() &&
                      counter.device() == x.device(),
                  "counter must be contiguous int64 [4]: step, seed, stream, 0; on x's device");
  STD_TORCH_CHECK(sample_ids.scalar_type() == ScalarType::Long && sample_ids.dim() == 1 &&
                      sample_ids.size(0) == x.size(0) && sample_ids.is_contiguous() &&
                      sample_ids.device() == x.device(),
                  "sample_ids must be contiguous int64 [B], on x's device");

  StepArguments args{};
  args.x = data<float>(x);
  args.cond = model_output.const_data_ptr();
  args.output = image_layout(model_output, "model_output");
  args.output_type = type_of(model_output, "model_output");
  if (uncond.has_value()) {
    check_images(*uncond, x, 1, true, "model_output_uncond");
    const ImageLayout layout = image_layout(*uncond, "model_output_uncond");
    STD_TORCH_CHECK(type_of(*uncond, "model_output_uncond") == args.output_type &&
                        uncond->size(1) == model_output.size(1) && layout.sample == args.output.sample &&
                        layout.channel == args.output.channel && layout.position == args.output.position,
                    "model_output_uncond must match model_output in dtype, shape and strides");
    args.uncond = uncond->const_data_ptr();
  }
  args.noise = data<float>(noise);
  args.table = data<double>(table);
  args.counter = static_cast<int64_t*>(const_cast<void*>(counter.const_data_ptr()));
  args.sample_ids = data<int64_t>(sample_ids);
  args.batch = x.size(0);
  args.channels = x.size(1);
  args.positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) args.positions *= x.size(d);
  args.rows = table.size(0);
  args.learned_variance = model_output.size(1) != x.size(1);
  return args;
}

template <class Launch>
std::tuple<Tensor, Tensor> checked_step(const Tensor& x, const Tensor& model_output,
                                        const std::optional<Tensor>& uncond, const std::optional<Tensor>& x0_prev,
                                        const std::optional<Tensor>& noise, const Tensor& table, const Tensor& counter,
                                        const Tensor& sample_ids, const Launch& launch) {
  StepArguments args = checked_arguments(x, model_output, uncond, noise, table, counter, sample_ids);
  if (x0_prev.has_value()) check_float(*x0_prev, x, "x0_prev");
  Tensor x_next = torch::stable::empty_like(x), x0 = torch::stable::empty_like(x);
  args.x0_prev = data<float>(x0_prev);
  args.has_x0_prev = x0_prev.has_value();
  args.x_next = static_cast<float*>(x_next.mutable_data_ptr());
  args.x0 = static_cast<float*>(x0.mutable_data_ptr());
  if (x.numel() > 0) launch(args);
  return {x_next, x0};
}

// Reads and overwrites x and x0, overwrites unet_input, and increments the counter's step.
template <class Launch>
void checked_step_in_place(const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& uncond,
                           const std::optional<Tensor>& x0, const std::optional<Tensor>& noise, const Tensor& table,
                           const Tensor& counter, const Tensor& sample_ids, const std::optional<Tensor>& unet_input,
                           const Launch& launch) {
  StepArguments args = checked_arguments(x, model_output, uncond, noise, table, counter, sample_ids);
  args.x_next = const_cast<float*>(args.x);
  if (x0.has_value()) {
    check_float(*x0, x, "x0");
    args.x0_prev = args.x0 = static_cast<float*>(x0->mutable_data_ptr());
    args.has_x0_prev = true;
  }
  if (unet_input.has_value()) {
    check_images(*unet_input, x, 2, false, "unet_input");
    args.unet_input = unet_input->mutable_data_ptr();
    args.input = image_layout(*unet_input, "unet_input");
    args.input_type = type_of(*unet_input, "unet_input");
    args.replicas = x.size(0) > 0 ? unet_input->size(0) / x.size(0) : 0;
  }
  args.in_place = true;
  launch(args);
}

}  // namespace fused_diffusion
