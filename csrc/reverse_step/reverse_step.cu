// fused_diffusion::reverse_step on CUDA: one pass, one thread for each noise block of four elements.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "reverse_step/args.h"

namespace fused_diffusion {
namespace {

struct alignas(8) Four16 {
  uint16_t bits[4];
};

template <class T>
__device__ __forceinline__ void load_four(float (&to)[4], const T* from) {
  const Four16 v = *reinterpret_cast<const Four16*>(from);
  for (int i = 0; i < 4; ++i) to[i] = to_float(T{v.bits[i]});
}

__device__ __forceinline__ void load_four(float (&to)[4], const float* from) { load4(to, from, 4, true); }

template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&from)[4]) {
  Four16 v;
  for (int i = 0; i < 4; ++i) {
    T rounded;
    from_float(from[i], rounded);
    v.bits[i] = rounded.bits;
  }
  *reinterpret_cast<Four16*>(to) = v;
}

__device__ __forceinline__ void store_four(float* to, const float (&from)[4]) { store4(to, from, 4, true); }

// Four consecutive elements of sample `sample`, from `first` on, of which the first `count` exist. Called with a
// layout, the offset of element i.
struct FourElements {
  int64_t sample, first, count, channels, positions;

  __device__ int64_t operator()(const ImageLayout& layout, int i) const {
    const int64_t element = first + i;
    return sample * layout.sample + element / positions * layout.channel + element % positions * layout.position;
  }
};

// vector: whether the four elements are one aligned access.
template <class T>
__device__ __forceinline__ void load_output(float (&to)[4], const T* from, const FourElements& four,
                                            const ImageLayout& layout, bool vector) {
  if (vector) return load_four(to, from + four(layout, 0));
  for (int i = 0; i < 4; ++i) to[i] = i < four.count ? to_float(from[four(layout, i)]) : 0.0f;
}

template <class T>
__device__ __forceinline__ void store_input(T* to, const float (&from)[4], const FourElements& four,
                                            const StepArguments& args, bool vector) {
  for (int64_t replica = 0; replica < args.replicas; ++replica, to += args.batch * args.input.sample) {
    if (vector) {
      store_four(to + four(args.input, 0), from);
    } else {
      for (int i = 0; i < 4; ++i) {
        if (i < four.count) from_float(from[i], to[four(args.input, i)]);
      }
    }
  }
}

// Whether four elements can be accessed at once, of: x and all tensors with its layout, the model outputs, the UNet's
// input.
struct VectorAccess {
  bool images, output, input;
};

template <class T>
__device__ __forceinline__ void step_block(const StepArguments& args, const StepCoefficients& row, uint64_t seed,
                                           uint32_t stream, int64_t sample, int64_t block,
                                           const VectorAccess& vectors) {
  const int64_t elements = args.channels * args.positions, first = 4 * block, count = elements - first;
  const int64_t at = sample * elements + first;
  const FourElements four{sample, first, count, args.channels, args.positions};
  const T* cond = static_cast<const T*>(args.cond);
  float x[4], out[4], x0[4], next[4];
  load4(x, args.x + at, count, vectors.images);
  load_output(out, cond, four, args.output, vectors.output);
  if (args.uncond != nullptr) {
    float uncond[4];
    load_output(uncond, static_cast<const T*>(args.uncond), four, args.output, vectors.output);
    for (int i = 0; i < 4; ++i) out[i] = guide(out[i], uncond[i], row);
  }
  for (int i = 0; i < 4; ++i) {
    x0[i] = predict_x0(x[i], out[i], row);
    next[i] = drift(x[i], x0[i], out[i], row);
  }
  if (row.coef_x0_prev != 0.0f) {
    float x0_prev[4] = {__builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf("")};
    if (args.x0_prev != nullptr) load4(x0_prev, args.x0_prev + at, count, vectors.images);
    for (int i = 0; i < 4; ++i) next[i] += row.coef_x0_prev * x0_prev[i];
  }
  if (row.sigma != 0.0f) {
    float z[4];
    if (args.noise != nullptr) {
      load4(z, args.noise + at, count, vectors.images);
    } else {
      normal_block(z, static_cast<uint32_t>(block), stream, static_cast<uint64_t>(args.sample_ids[sample]), seed);
    }
    if (args.learned_variance) {
      float v[4];
      load_output(v, cond + args.channels * args.output.channel, four, args.output, vectors.output);
      for (int i = 0; i < 4; ++i) next[i] += learned_sigma<HardwareFma>(v[i], row) * z[i];
    } else {
      for (int i = 0; i < 4; ++i) next[i] += row.sigma * z[i];
    }
  }
  store4(args.x_next + at, next, count, vectors.images);
  if (args.x0 != nullptr) store4(args.x0 + at, x0, count, vectors.images);
  if (args.unet_input == nullptr) return;
  if (args.input_type == Type::float32) {
    store_input(static_cast<float*>(args.unet_input), next, four, args, vectors.input);
  } else if (args.input_type == Type::bfloat16) {
    store_input(static_cast<BFloat16*>(args.unet_input), next, four, args, vectors.input);
  } else {
    store_input(static_cast<Half*>(args.unet_input), next, four, args, vectors.input);
  }
}

// The last block to arrive increments the step, when all blocks have read it.
__device__ __forceinline__ void advance(int64_t* counter, int64_t step) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  auto* done = reinterpret_cast<unsigned long long*>(counter + 3);
  if (atomicAdd(done, 1ull) + 1 == static_cast<unsigned long long>(gridDim.x) * gridDim.y) {
    *done = 0;
    counter[0] = step + 1;
  }
}

// The row and the seed are read from device memory, so that one captured CUDA graph serves every step and image.
template <class T>
__global__ void __launch_bounds__(kThreads) reverse_step_kernel(const StepArguments args, VectorAccess vectors) {
  const int64_t step = *static_cast<volatile int64_t*>(args.counter);
  const StepCoefficients row = load_row(args.table, args.rows, step);
  const uint64_t seed = static_cast<uint64_t>(args.counter[1]);
  const uint32_t stream = static_cast<uint32_t>(args.counter[2] + step);
  const int64_t blocks = (args.channels * args.positions + 3) / 4;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t sample = blockIdx.y; sample < args.batch; sample += gridDim.y) {
    for (int64_t b = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; b < blocks; b += stride) {
      step_block<T>(args, row, seed, stream, sample, b, vectors);
    }
  }
  if (args.in_place) advance(args.counter, step);
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether the four elements of every thread are consecutive in memory, from a multiple of four on.
bool in_fours(const ImageLayout& layout, const StepArguments& args) {
  return layout.position == 1 && layout.sample % 4 == 0 && layout.channel % 4 == 0 &&
         (layout.channel == args.positions || args.positions % 4 == 0);
}

struct CudaReverseStep {
  cudaStream_t stream;

  void operator()(const StepArguments& args) const {
    const int64_t elements = args.channels * args.positions;
    const bool fours = elements % 4 == 0;
    const VectorAccess vectors{fours && aligned(args.x) && aligned(args.x_next) && aligned(args.x0) &&
                                   aligned(args.x0_prev) && aligned(args.noise),
                               fours && in_fours(args.output, args) && aligned(args.cond) && aligned(args.uncond),
                               fours && in_fours(args.input, args) && aligned(args.unet_input)};
    // An empty batch still increments the counter.
    const dim3 grid = grid_for(std::max<int64_t>(args.batch, 1), std::max<int64_t>((elements + 3) / 4, 1));
    if (args.output_type == Type::float32) {
      launch(reverse_step_kernel<float>, grid, kThreads, 0, stream, args, vectors);
    } else if (args.output_type == Type::bfloat16) {
      launch(reverse_step_kernel<BFloat16>, grid, kThreads, 0, stream, args, vectors);
    } else {
      launch(reverse_step_kernel<Half>, grid, kThreads, 0, stream, args, vectors);
    }
  }
};

std::tuple<Tensor, Tensor> reverse_step(const Tensor& x, const Tensor& model_output,
                                        const std::optional<Tensor>& model_output_uncond,
                                        const std::optional<Tensor>& x0_prev, const std::optional<Tensor>& noise,
                                        const Tensor& table, const Tensor& counter, const Tensor& sample_ids) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return checked_step(x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids,
                      CudaReverseStep{current_stream(x)});
}

void reverse_step_(const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& model_output_uncond,
                   const std::optional<Tensor>& x0, const std::optional<Tensor>& noise, const Tensor& table,
                   const Tensor& counter, const Tensor& sample_ids, const std::optional<Tensor>& unet_input) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  checked_step_in_place(x, model_output, model_output_uncond, x0, noise, table, counter, sample_ids, unet_input,
                        CudaReverseStep{current_stream(x)});
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("reverse_step", TORCH_BOX(&fused_diffusion::reverse_step));
  m.impl("reverse_step_", TORCH_BOX(&fused_diffusion::reverse_step_));
}
