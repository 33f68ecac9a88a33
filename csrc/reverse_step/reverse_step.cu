// fused_diffusion::reverse_step on CUDA: one pass, one thread for each noise block of four elements; of RGB images in
// channels_last, as a UNet puts them out, one thread for the three blocks of four pixels, whose 12 numbers lie together.
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
  int64_t sample, count, positions, channel, position;  // channel and position: of the first element

  __device__ FourElements(const StepArguments& args, int64_t sample, int64_t first)
      : sample(sample),
        count(args.channels * args.positions - first),
        positions(args.positions),
        channel(first / positions),
        position(first - channel * positions) {}

  __device__ int64_t operator()(const ImageLayout& layout, int i) const {
    int64_t c = channel, p = position + i;
    while (p >= positions) p -= positions, ++c;  // a division would take a hundred instructions
    return sample * layout.sample + c * layout.channel + p * layout.position;
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

// What all threads of a step have in common.
struct StepState {
  StepCoefficients row;
  int64_t step;
  uint64_t seed;
  uint32_t stream;

  __device__ explicit StepState(const StepArguments& args)
      : step(*static_cast<volatile int64_t*>(args.counter)), seed(static_cast<uint64_t>(args.counter[1])) {
    row = load_row(args.table, args.rows, step);
    stream = static_cast<uint32_t>(args.counter[2] + step);
  }
};

// The step of four consecutive elements, number `block` of their sample, from the model's guided output and v of a
// learned variance. at: where they are in x. Writes all but the UNet's input.
__device__ __forceinline__ void step_four(float (&next)[4], const float (&out)[4], const float (&v)[4],
                                          const StepArguments& args, const StepState& state, int64_t sample,
                                          int64_t block, int64_t at, int64_t count, bool vector) {
  const StepCoefficients& row = state.row;
  float x[4], x0[4];
  load4(x, args.x + at, count, vector);
  for (int i = 0; i < 4; ++i) {
    x0[i] = predict_x0(x[i], out[i], row);
    next[i] = drift(x[i], x0[i], out[i], row);
  }
  if (row.coef_x0_prev != 0.0f) {
    float x0_prev[4] = {__builtin_nanf(""), __builtin_nanf(""), __builtin_nanf(""), __builtin_nanf("")};
    if (args.x0_prev != nullptr) load4(x0_prev, args.x0_prev + at, count, vector);
    for (int i = 0; i < 4; ++i) next[i] += row.coef_x0_prev * x0_prev[i];
  }
  if (row.sigma != 0.0f) {
    float z[4];
    if (args.noise != nullptr) {
      load4(z, args.noise + at, count, vector);
    } else {
      const uint64_t id = static_cast<uint64_t>(args.sample_ids[sample]);
      normal_block(z, static_cast<uint32_t>(block), state.stream, id, state.seed);
    }
    for (int i = 0; i < 4; ++i) {
      next[i] += (args.learned_variance ? learned_sigma<HardwareFma>(v[i], row) : row.sigma) * z[i];
    }
  }
  store4(args.x_next + at, next, count, vector);
  if (args.x0 != nullptr) store4(args.x0 + at, x0, count, vector);
}

// Calls write(a null pointer of the type of the UNet's input).
template <class Write>
__device__ __forceinline__ void with_input_type(const StepArguments& args, const Write& write) {
  if (args.input_type == Type::float32) {
    write(static_cast<float*>(nullptr));
  } else if (args.input_type == Type::bfloat16) {
    write(static_cast<BFloat16*>(nullptr));
  } else {
    write(static_cast<Half*>(nullptr));
  }
}

template <class T>
__device__ __forceinline__ void step_block(const StepArguments& args, const StepState& state, int64_t sample,
                                           int64_t block, const VectorAccess& vectors) {
  const FourElements four(args, sample, 4 * block);
  const T* cond = static_cast<const T*>(args.cond);
  float out[4], v[4] = {}, next[4];
  load_output(out, cond, four, args.output, vectors.output);
  if (args.uncond != nullptr) {
    float uncond[4];
    load_output(uncond, static_cast<const T*>(args.uncond), four, args.output, vectors.output);
    for (int i = 0; i < 4; ++i) out[i] = guide(out[i], uncond[i], state.row);
  }
  if (args.learned_variance) {
    load_output(v, cond + args.channels * args.output.channel, four, args.output, vectors.output);
  }
  const int64_t at = sample * args.channels * args.positions + 4 * block;
  step_four(next, out, v, args, state, sample, block, at, four.count, vectors.images);
  if (args.unet_input == nullptr) return;
  with_input_type(args, [&](auto* type) {
    store_input(static_cast<decltype(type)>(args.unet_input), next, four, args, vectors.input);
  });
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

// Calls take(sample, i) for each of `count` parts of every sample, and ends the step.
template <class Take>
__device__ __forceinline__ void each_part(const StepArguments& args, int64_t step, int64_t count, const Take& take) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t sample = blockIdx.y; sample < args.batch; sample += gridDim.y) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
      take(sample, i);
    }
  }
  if (args.in_place) advance(args.counter, step);
}

// The row and the seed are read from device memory, so that one captured CUDA graph serves every step and image.
template <class T>
__global__ void __launch_bounds__(kThreads) reverse_step_kernel(const StepArguments args, VectorAccess vectors) {
  const StepState state(args);
  const int64_t blocks = (args.channels * args.positions + 3) / 4;
  each_part(args, state.step, blocks, [&](int64_t sample, int64_t block) {
    step_block<T>(args, state, sample, block, vectors);
  });
}

// The same for RGB images whose pixels' channels lie together. kOut: channels of the model's output, 3 or 6. A thread
// reads four pixels of it in whole accesses of 4 numbers.
template <class T, int kOut>
__global__ void __launch_bounds__(kThreads) reverse_step_rgb_kernel(const StepArguments args) {
  const StepState state(args);
  const int64_t blocks = args.positions / 4;  // of a channel
  each_part(args, state.step, blocks, [&](int64_t sample, int64_t block) {
    const int64_t pixel = sample * args.positions + 4 * block;
    float cond[kOut][4], uncond[kOut][4], written[3][4];  // consecutive in memory
    for (int k = 0; k < kOut; ++k) load_four(cond[k], static_cast<const T*>(args.cond) + pixel * kOut + 4 * k);
    if (args.uncond != nullptr) {
      for (int k = 0; k < kOut; ++k) load_four(uncond[k], static_cast<const T*>(args.uncond) + pixel * kOut + 4 * k);
    }
#pragma unroll
    for (int c = 0; c < 3; ++c) {
      float out[4], v[4] = {}, next[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = i * kOut + c;
        out[i] = cond[at / 4][at % 4];
        if (args.uncond != nullptr) out[i] = guide(out[i], uncond[at / 4][at % 4], state.row);
        if (kOut == 6) v[i] = cond[(at + 3) / 4 % kOut][(at + 3) % 4];
      }
      const int64_t at = 3 * sample * args.positions + c * args.positions + 4 * block;
      step_four(next, out, v, args, state, sample, c * blocks + block, at, 4, true);
#pragma unroll
      for (int i = 0; i < 4; ++i) written[(3 * i + c) / 4][(3 * i + c) % 4] = next[i];
    }
    if (args.unet_input == nullptr) return;
    with_input_type(args, [&](auto* type) {
      auto* to = static_cast<decltype(type)>(args.unet_input) + 3 * pixel;
      for (int64_t replica = 0; replica < args.replicas; ++replica, to += args.batch * args.input.sample) {
        for (int k = 0; k < 3; ++k) store_four(to + 4 * k, written[k]);
      }
    });
  });
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether the four elements of every thread are consecutive in memory, from a multiple of four on.
bool in_fours(const ImageLayout& layout, const StepArguments& args) {
  return layout.position == 1 && layout.sample % 4 == 0 && layout.channel % 4 == 0 &&
         (layout.channel == args.positions || args.positions % 4 == 0);
}

// Whether the images have three channels, and a map's `channels` ones of each pixel lie together.
bool together(const ImageLayout& layout, const StepArguments& args, int64_t channels) {
  return args.channels == 3 && layout.channel == 1 && layout.position == channels &&
         layout.sample == args.positions * channels;
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
    const bool aligned_maps = aligned(args.cond) && aligned(args.uncond) && aligned(args.unet_input);
    const bool rgb = args.positions % 4 == 0 && vectors.images && aligned_maps &&
                     together(args.output, args, args.learned_variance ? 6 : 3) &&
                     (args.unet_input == nullptr || together(args.input, args, 3));
    if (args.output_type == Type::float32) {
      run<float>(args, vectors, rgb);
    } else if (args.output_type == Type::bfloat16) {
      run<BFloat16>(args, vectors, rgb);
    } else {
      run<Half>(args, vectors, rgb);
    }
  }

  template <class T>
  void run(const StepArguments& args, const VectorAccess& vectors, bool rgb) const {
    // An empty batch still increments the counter.
    const int64_t batch = std::max<int64_t>(args.batch, 1), elements = args.channels * args.positions;
    if (!rgb) {
      const dim3 grid = grid_for(batch, std::max<int64_t>((elements + 3) / 4, 1));
      return launch(reverse_step_kernel<T>, grid, kThreads, 0, stream, args, vectors);
    }
    const dim3 grid = grid_for(batch, std::max<int64_t>(args.positions / 4, 1));
    if (args.learned_variance) {
      launch(reverse_step_rgb_kernel<T, 6>, grid, kThreads, 0, stream, args);
    } else {
      launch(reverse_step_rgb_kernel<T, 3>, grid, kThreads, 0, stream, args);
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
