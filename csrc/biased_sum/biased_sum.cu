// fused_diffusion::biased_sum_ on CUDA: bias and residual of a convolution in one pass over its output, one thread for
// 16 bytes of a pixel's channels. kernels/ops/biased_sum/library.py has the equation.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "common/channels_last.h"
#include "common/floats.h"
#include "cuda/launch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kPackBytes = 16;

// Maps of `pixels` pixels, in rows of `width`; null pointers stand for None. A pixel of x is x_pixel elements after the
// one before, and so on.
struct SumArguments {
  const void *x, *bias, *residual;
  void *out, *copy;
  int64_t pixels, width, channels, x_pixel, residual_pixel, out_pixel, copy_pixel;
  int scale;
};

template <class T, int kPack>
struct alignas(sizeof(T) * kPack) Numbers {
  T items[kPack];
};

template <class T, int kPack>
__device__ __forceinline__ void add_numbers(float (&sum)[kPack], const void* from, int64_t at) {
  const auto pack = *reinterpret_cast<const Numbers<T, kPack>*>(static_cast<const T*>(from) + at);
#pragma unroll
  for (int i = 0; i < kPack; ++i) sum[i] += to_float(pack.items[i]);
}

template <class T, int kPack>
__device__ __forceinline__ void store_numbers(void* to, int64_t at, const Numbers<T, kPack>& pack) {
  *reinterpret_cast<Numbers<T, kPack>*>(static_cast<T*>(to) + at) = pack;
}

template <class T, int kPack, class Index>
__global__ void __launch_bounds__(kThreads) biased_sum_kernel(const SumArguments args) {
  const Index packs = static_cast<Index>(args.channels / kPack), width = static_cast<Index>(args.width);
  const Index count = static_cast<Index>(args.pixels) * packs, stride = static_cast<Index>(gridDim.x) * kThreads;
  for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += stride) {
    const Index pixel = i / packs;
    const int64_t channel = static_cast<int64_t>(i - pixel * packs) * kPack;
    float sum[kPack] = {};
    add_numbers<T>(sum, args.x, pixel * args.x_pixel + channel);
    if (args.bias != nullptr) add_numbers<T>(sum, args.bias, channel);
    if (args.residual != nullptr) add_numbers<T>(sum, args.residual, pixel * args.residual_pixel + channel);
    Numbers<T, kPack> rounded;
#pragma unroll
    for (int k = 0; k < kPack; ++k) from_float(sum[k], rounded.items[k]);
    if (args.scale == 1) {
      store_numbers(args.out, pixel * args.out_pixel + channel, rounded);
      if (args.copy != nullptr) store_numbers(args.copy, pixel * args.copy_pixel + channel, rounded);
      continue;
    }
    const Index row = pixel / width, column = pixel - row * width;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t to = (2 * static_cast<int64_t>(row) + k / 2) * 2 * args.width + 2 * column + k % 2;
      store_numbers(args.out, to * args.out_pixel + channel, rounded);
      if (args.copy != nullptr) store_numbers(args.copy, to * args.copy_pixel + channel, rounded);
    }
  }
}

template <class T, int kPack>
void run(const SumArguments& args, cudaStream_t stream) {
  const int64_t threads = args.pixels * (args.channels / kPack);
  const int64_t blocks = std::min<int64_t>((threads + kThreads - 1) / kThreads, 1 << 20);
  const dim3 grid(static_cast<unsigned>(blocks));
  if (threads + blocks * kThreads < INT32_MAX) {  // divisions of 32 bits take a third of the instructions
    launch(biased_sum_kernel<T, kPack, uint32_t>, grid, kThreads, 0, stream, args);
  } else {
    launch(biased_sum_kernel<T, kPack, int64_t>, grid, kThreads, 0, stream, args);
  }
}

template <class T>
void run(const SumArguments& args, cudaStream_t stream) {
  constexpr int kPack = kPackBytes / sizeof(T);
  bool whole = true;
  for (const int64_t n : {args.channels, args.x_pixel, args.residual_pixel, args.out_pixel, args.copy_pixel}) {
    whole = whole && n % kPack == 0;
  }
  for (const void* p : std::initializer_list<const void*>{args.x, args.bias, args.residual, args.out, args.copy}) {
    whole = whole && reinterpret_cast<uintptr_t>(p) % kPackBytes == 0;
  }
  if (whole) return run<T, kPack>(args, stream);
  run<T, 1>(args, stream);
}

// The distance between the pixels of a map that fits x, each of whose pixels it has `scale` times scale times.
int64_t checked_map(const Tensor& map, const Tensor& x, int64_t scale, const char* name) {
  STD_TORCH_CHECK(map.dim() == 4 && map.size(0) == x.size(0) && map.size(1) == x.size(1) &&
                      map.size(2) == scale * x.size(2) && map.size(3) == scale * x.size(3) &&
                      map.scalar_type() == x.scalar_type() && map.device() == x.device(),
                  name, " does not fit x in shape, dtype or device");
  return pixel_distance(map, name);
}

void biased_sum_(const Tensor& x, const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                 const Tensor& out, const std::optional<Tensor>& copy, int64_t scale) {
  STD_TORCH_CHECK(x.dim() == 4 && (scale == 1 || scale == 2), "x must be [N, C, H, W], and scale 1 or 2");
  SumArguments args{};
  args.pixels = x.size(0) * x.size(2) * x.size(3);
  args.width = x.size(3);
  args.channels = x.size(1);
  args.scale = static_cast<int>(scale);
  args.x = x.const_data_ptr();
  args.x_pixel = checked_map(x, x, 1, "x");
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->numel() == x.size(1) && bias->is_contiguous() &&
                        bias->scalar_type() == x.scalar_type() && bias->device() == x.device(),
                    "bias must be contiguous, [C] and of x's dtype");
    args.bias = bias->const_data_ptr();
  }
  if (residual.has_value()) {
    args.residual = residual->const_data_ptr();
    args.residual_pixel = checked_map(*residual, x, 1, "residual");
  }
  args.out = out.mutable_data_ptr();
  args.out_pixel = checked_map(out, x, scale, "out");
  if (copy.has_value()) {
    args.copy = copy->mutable_data_ptr();
    args.copy_pixel = checked_map(*copy, x, scale, "copy");
  }
  if (x.numel() == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  if (x.scalar_type() == ScalarType::Float) return run<float>(args, stream);
  if (x.scalar_type() == ScalarType::BFloat16) return run<BFloat16>(args, stream);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "x must be float32, bfloat16 or float16");
  run<Half>(args, stream);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) { m.impl("biased_sum_", TORCH_BOX(&fused_diffusion::biased_sum_)); }
