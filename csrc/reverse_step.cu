// fused_diffusion::reverse_step on CUDA: one pass, one thread for each noise block of four elements.
#include <torch/csrc/stable/library.h>

#include "cuda.h"
#include "step_arguments.h"

namespace fused_diffusion {
namespace {

struct alignas(8) FourHalves {
  uint16_t bits[4];
};

template <class T>
__device__ __forceinline__ void load_output(float (&to)[4], const T* from, int64_t left, bool vector) {
  if (vector) {
    const FourHalves v = *reinterpret_cast<const FourHalves*>(from);
    for (int i = 0; i < 4; ++i) to[i] = to_float(T{v.bits[i]});
  } else {
    for (int i = 0; i < 4; ++i) to[i] = i < left ? to_float(from[i]) : 0.0f;
  }
}

__device__ __forceinline__ void load_output(float (&to)[4], const float* from, int64_t left, bool vector) {
  load4(to, from, left, vector);
}

template <class T>
__device__ __forceinline__ void step_block(const StepArguments& args, const Row& row, uint64_t seed,
                                           uint32_t stream, int64_t sample, int64_t block, bool vector) {
  const int64_t first = 4 * block, left = args.elements - first, at = sample * args.elements + first;
  const int64_t out_at = args.learned_variance ? at + sample * args.elements : at;
  const T* cond = static_cast<const T*>(args.cond) + out_at;
  float x[4], out[4], x0[4], next[4];
  load4(x, args.x + at, left, vector);
  load_output(out, cond, left, vector);
  if (args.uncond != nullptr) {
    float uncond[4];
    load_output(uncond, static_cast<const T*>(args.uncond) + out_at, left, vector);
    for (int i = 0; i < 4; ++i) out[i] = guide(out[i], uncond[i], row);
  }
  for (int i = 0; i < 4; ++i) {
    x0[i] = predict_x0(x[i], out[i], row);
    next[i] = drift(x[i], x0[i], out[i], row);
  }
  if (row.d != 0.0f) {
    float x0_prev[4] = {__builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf("")};
    if (args.x0_prev != nullptr) load4(x0_prev, args.x0_prev + at, left, vector);
    for (int i = 0; i < 4; ++i) next[i] += row.d * x0_prev[i];
  }
  if (row.s != 0.0f) {
    float z[4];
    if (args.noise != nullptr) {
      load4(z, args.noise + at, left, vector);
    } else {
      normal_block(z, static_cast<uint32_t>(block), stream, static_cast<uint64_t>(args.sample_ids[sample]),
                   seed);
    }
    if (args.learned_variance) {
      float v[4];
      load_output(v, cond + args.elements, left, vector);
      for (int i = 0; i < 4; ++i) next[i] += learned_sigma<HardwareFma>(v[i], row) * z[i];
    } else {
      for (int i = 0; i < 4; ++i) next[i] += row.s * z[i];
    }
  }
  store4(args.x_next + at, next, left, vector);
  store4(args.x0 + at, x0, left, vector);
}

// The row and the seed come from device memory, so that one captured graph serves every step and image.
template <class T>
__global__ void __launch_bounds__(kThreads) reverse_step_kernel(const StepArguments args, bool vector) {
  const int64_t step = args.counter[0];
  const Row row = load_row(args.table, args.rows, step);
  const uint64_t seed = static_cast<uint64_t>(args.counter[1]);
  const uint32_t stream = static_cast<uint32_t>(args.counter[2] + step);
  const int64_t blocks = (args.elements + 3) / 4, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t sample = blockIdx.y; sample < args.batch; sample += gridDim.y) {
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < blocks; b += stride) {
      step_block<T>(args, row, seed, stream, sample, b, vector);
    }
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

struct Launch {
  cudaStream_t stream;

  void operator()(const StepArguments& args) const {
    const bool vector = args.elements % 4 == 0 && aligned(args.x) && aligned(args.cond) &&
                        aligned(args.uncond) && aligned(args.x0_prev) && aligned(args.noise);
    const dim3 grid = grid_for(args.batch, (args.elements + 3) / 4);
    if (args.output_type == OutputType::float32) {
      reverse_step_kernel<float><<<grid, kThreads, 0, stream>>>(args, vector);
    } else if (args.output_type == OutputType::bfloat16) {
      reverse_step_kernel<BFloat16><<<grid, kThreads, 0, stream>>>(args, vector);
    } else {
      reverse_step_kernel<Half><<<grid, kThreads, 0, stream>>>(args, vector);
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

std::tuple<Tensor, Tensor> reverse_step(const Tensor& x, const Tensor& model_output,
                                        const std::optional<Tensor>& model_output_uncond,
                                        const std::optional<Tensor>& x0_prev,
                                        const std::optional<Tensor>& noise, const Tensor& table,
                                        const Tensor& counter, const Tensor& sample_ids) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return checked_step(x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids,
                      Launch{current_stream(x)});
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("reverse_step", TORCH_BOX(&fused_diffusion::reverse_step));
}
