// fused_diffusion::reverse_step on CUDA: one pass, one thread for each noise block of four elements.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "reverse_step/args.h"

namespace fused_diffusion {
namespace {

struct alignas(8) FourHalves {
  uint16_t bits[4];
};

template <class T>
__device__ __forceinline__ void load_four(float (&to)[4], const T* from) {
  const FourHalves v = *reinterpret_cast<const FourHalves*>(from);
  for (int i = 0; i < 4; ++i) to[i] = to_float(T{v.bits[i]});
}

__device__ __forceinline__ void load_four(float (&to)[4], const float* from) { load4(to, from, 4, true); }

template <class T>
__device__ __forceinline__ void store_four(T* to, const float (&from)[4]) {
  FourHalves v;
  for (int i = 0; i < 4; ++i) {
    T rounded;
    from_float(from[i], rounded);
    v.bits[i] = rounded.bits;
  }
  *reinterpret_cast<FourHalves*>(to) = v;
}

__device__ __forceinline__ void store_four(float* to, const float (&from)[4]) { store4(to, from, 4, true); }

// Four consecutive elements of sample `sample`, from `first` on: where they are in a tensor of some layout.
struct Place {
  int64_t sample, first, left, channels, positions;

  __device__ int64_t operator()(const Layout& layout, int i) const {
    const int64_t element = first + i;
    return sample * layout.sample + element / positions * layout.channel +
           element % positions * layout.position;
  }
};

// `vector`: the four are one aligned access, at element 0's place.
template <class T>
__device__ __forceinline__ void load_output(float (&to)[4], const T* from, const Place& place,
                                            const Layout& layout, bool vector) {
  if (vector) return load_four(to, from + place(layout, 0));
  for (int i = 0; i < 4; ++i) to[i] = i < place.left ? to_float(from[place(layout, i)]) : 0.0f;
}

template <class T>
__device__ __forceinline__ void store_input(T* to, const float (&from)[4], const Place& place,
                                            const StepArguments& args, bool vector) {
  for (int64_t copy = 0; copy < args.copies; ++copy, to += args.batch * args.input.sample) {
    if (vector) {
      store_four(to + place(args.input, 0), from);
    } else {
      for (int i = 0; i < 4; ++i) {
        if (i < place.left) from_float(from[i], to[place(args.input, i)]);
      }
    }
  }
}

// Which accesses can be of four elements at once: x and what is laid out like it, outputs, the UNet's input.
struct Vectors {
  bool images, output, input;
};

template <class T>
__device__ __forceinline__ void step_block(const StepArguments& args, const StepCoefficients& row,
                                           uint64_t seed, uint32_t stream, int64_t sample, int64_t block,
                                           const Vectors& vectors) {
  const int64_t elements = args.channels * args.positions, first = 4 * block, left = elements - first;
  const int64_t at = sample * elements + first;
  const Place place{sample, first, left, args.channels, args.positions};
  const T* cond = static_cast<const T*>(args.cond);
  float x[4], out[4], x0[4], next[4];
  load4(x, args.x + at, left, vectors.images);
  load_output(out, cond, place, args.output, vectors.output);
  if (args.uncond != nullptr) {
    float uncond[4];
    load_output(uncond, static_cast<const T*>(args.uncond), place, args.output, vectors.output);
    for (int i = 0; i < 4; ++i) out[i] = guide(out[i], uncond[i], row);
  }
  for (int i = 0; i < 4; ++i) {
    x0[i] = predict_x0(x[i], out[i], row);
    next[i] = drift(x[i], x0[i], out[i], row);
  }
  if (row.coef_x0_prev != 0.0f) {
    float x0_prev[4] = {__builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf("")};
    if (args.x0_prev != nullptr) load4(x0_prev, args.x0_prev + at, left, vectors.images);
    for (int i = 0; i < 4; ++i) next[i] += row.coef_x0_prev * x0_prev[i];
  }
  if (row.sigma != 0.0f) {
    float z[4];
    if (args.noise != nullptr) {
      load4(z, args.noise + at, left, vectors.images);
    } else {
      normal_block(z, static_cast<uint32_t>(block), stream, static_cast<uint64_t>(args.sample_ids[sample]),
                   seed);
    }
    if (args.learned_variance) {
      float v[4];
      load_output(v, cond + args.channels * args.output.channel, place, args.output, vectors.output);
      for (int i = 0; i < 4; ++i) next[i] += learned_sigma<HardwareFma>(v[i], row) * z[i];
    } else {
      for (int i = 0; i < 4; ++i) next[i] += row.sigma * z[i];
    }
  }
  store4(args.x_next + at, next, left, vectors.images);
  if (args.x0 != nullptr) store4(args.x0 + at, x0, left, vectors.images);
  if (args.unet_input == nullptr) return;
  if (args.input_type == Type::float32) {
    store_input(static_cast<float*>(args.unet_input), next, place, args, vectors.input);
  } else if (args.input_type == Type::bfloat16) {
    store_input(static_cast<BFloat16*>(args.unet_input), next, place, args, vectors.input);
  } else {
    store_input(static_cast<Half*>(args.unet_input), next, place, args, vectors.input);
  }
}

// The last block to get here, when all have read the counter, sends it on to the next step.
__device__ __forceinline__ void advance(int64_t* counter, int64_t step) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  auto* done = reinterpret_cast<unsigned long long*>(counter + 3);
  if (atomicAdd(done, 1ull) + 1 == static_cast<unsigned long long>(gridDim.x) * gridDim.y) {
    *done = 0;
    counter[0] = step + 1;
  }
}

// The row and the seed come from device memory, so that one captured graph serves every step and image.
template <class T>
__global__ void __launch_bounds__(kThreads) reverse_step_kernel(const StepArguments args, Vectors vectors) {
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

// Whether every four elements that a thread takes lie side by side, at a multiple of four.
bool in_fours(const Layout& layout, const StepArguments& args) {
  return layout.position == 1 && layout.sample % 4 == 0 && layout.channel % 4 == 0 &&
         (layout.channel == args.positions || args.positions % 4 == 0);
}

struct Launch {
  cudaStream_t stream;

  void operator()(const StepArguments& args) const {
    const int64_t elements = args.channels * args.positions;
    const bool fours = elements % 4 == 0;
    const Vectors vectors{fours && aligned(args.x) && aligned(args.x_next) && aligned(args.x0) &&
                              aligned(args.x0_prev) && aligned(args.noise),
                          fours && in_fours(args.output, args) && aligned(args.cond) && aligned(args.uncond),
                          fours && in_fours(args.input, args) && aligned(args.unet_input)};
    // An empty batch still has its step.
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
                                        const std::optional<Tensor>& x0_prev,
                                        const std::optional<Tensor>& noise, const Tensor& table,
                                        const Tensor& counter, const Tensor& sample_ids) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  return checked_step(x, model_output, model_output_uncond, x0_prev, noise, table, counter, sample_ids,
                      Launch{current_stream(x)});
}

void reverse_step_(const Tensor& x, const Tensor& model_output, const std::optional<Tensor>& model_output_uncond,
                   const std::optional<Tensor>& x0, const std::optional<Tensor>& noise, const Tensor& table,
                   const Tensor& counter, const Tensor& sample_ids, const std::optional<Tensor>& unet_input) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  checked_step_in_place(x, model_output, model_output_uncond, x0, noise, table, counter, sample_ids, unet_input,
                        Launch{current_stream(x)});
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("reverse_step", TORCH_BOX(&fused_diffusion::reverse_step));
  m.impl("reverse_step_", TORCH_BOX(&fused_diffusion::reverse_step_));
}
