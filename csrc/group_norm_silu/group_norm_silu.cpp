// fused_diffusion::group_norm_silu and its gradient on the CPU: blocks of whole groups of one sample, each read
// from memory once, shared among threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/parallel.h"
#include "simd/dispatch.h"
#include "common/channels_last.h"
#include "group_norm_silu/args.h"
#include "runtime/recorded_calls.h"
#include "common/targets.h"

namespace fused_diffusion {
namespace {

constexpr int64_t kBlockBytes = 1 << 18;      // a quarter of a second cache of today
constexpr int64_t kElementsPerThread = 1 << 15;  // like PyTorch: a smaller share is not worth a thread
constexpr int64_t kLineBytes = 64;
constexpr int64_t kChannelDoubles = 10;  // of scratch

namespace baseline {
#define FD_LANES 4
#define FD_BFLOAT16 0
#include "simd/vec.h"
#include "group_norm_silu/norm_cpu.h"
}  // namespace baseline

#if defined(__x86_64__)
FD_TARGET("avx2,fma")
namespace avx2 {
#define FD_LANES 8
#define FD_BFLOAT16 0
#include "simd/vec.h"
#include "group_norm_silu/norm_cpu.h"
}  // namespace avx2
FD_END_TARGET

FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define FD_LANES 16
#define FD_BFLOAT16 0
#include "simd/vec.h"
#include "group_norm_silu/norm_cpu.h"
}  // namespace avx512
FD_END_TARGET

FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
namespace avx512_bf16 {
#define FD_LANES 16
#define FD_BFLOAT16 1
#include "simd/vec.h"
#include "group_norm_silu/norm_cpu.h"
}  // namespace avx512_bf16
FD_END_TARGET
#endif

// The kernels of one instruction set for one element type.
struct Kernels {
  void (*forward)(const NormArguments&, void* y, int64_t groups, double* scratch, int64_t begin, int64_t end);
  void (*backward)(const NormArguments&, const NormGradient&, int64_t groups, double* scratch, int64_t begin,
                   int64_t end);
  void (*maps)(const NormArguments&, float* to, int64_t groups, double* scratch, int64_t begin, int64_t end);
};

template <class T>
Kernels kernels() {
#if defined(__x86_64__)
  const Simd simd = simd_in_use();
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (simd >= Simd::avx512_bf16) return {avx512_bf16::forward<T>, avx512_bf16::backward<T>, avx512_bf16::maps<T>};
  }
  if (simd >= Simd::avx512) return {avx512::forward<T>, avx512::backward<T>, avx512::maps<T>};
  if (simd == Simd::avx2) return {avx2::forward<T>, avx2::backward<T>, avx2::maps<T>};
#endif
  return {baseline::forward<T>, baseline::backward<T>, baseline::maps<T>};
}

Kernels kernels(ScalarType type) {
  if (type == ScalarType::Float) return kernels<float>();
  return type == ScalarType::BFloat16 ? kernels<BFloat16>() : kernels<Half>();
}

// Groups to a block: what fits in the cache, less where threads would go idle, but whole cache lines.
int64_t groups_per_block(const NormArguments& args) {
  const int64_t element = args.type == ScalarType::Float ? 4 : 2, threads = torch::stable::get_num_threads();
  const int64_t group_bytes = args.group_size() * args.positions * element;
  const int64_t row_bytes = args.channels_last ? args.group_size() * element : group_bytes;
  const int64_t least = std::min(args.groups, divide_up(kLineBytes, row_bytes));
  int64_t blocks = divide_up(args.groups, std::max(least, kBlockBytes / group_bytes));
  const auto idle = [&] { return args.samples * blocks < 4 * threads && args.samples * blocks % threads != 0; };
  while (idle() && 2 * blocks * least <= args.groups) blocks *= 2;
  return divide_up(args.groups, blocks);
}

// Calls run(groups, scratch, begin, end) on the threads.
template <class Run>
void each_block(const NormArguments& args, const Run& run) {
  const int64_t groups = groups_per_block(args), blocks = args.samples * divide_up(args.groups, groups);
  const int64_t width = groups * args.group_size();
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / (width * args.positions));
  parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[kChannelDoubles * width]);
    run(groups, scratch.get(), begin, end);
  });
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
                                                   std::optional<Tensor> bias, double eps,
                                                   std::optional<Tensor> add, std::optional<Tensor> scale,
                                                   std::optional<Tensor> shift, bool silu) {
  return checked_norm(x, num_groups, weight, bias, eps, add, scale, shift, silu,
                      [](const NormArguments& args, void* y) {
                        const auto forward = kernels(args.type).forward;
                        each_block(args, [&](int64_t groups, double* scratch, int64_t begin, int64_t end) {
                          forward(args, y, groups, scratch, begin, end);
                        });
                      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, int64_t num_groups, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> add, std::optional<Tensor> scale,
    std::optional<Tensor> shift, bool silu, const Tensor& mean, const Tensor& rstd) {
  return checked_norm_gradient(grad, x, num_groups, weight, bias, add, scale, shift, silu, mean, rstd,
                               [](const NormArguments& args, const NormGradient& gradient) {
                                 const auto backward = kernels(args.type).backward;
                                 each_block(args, [&](int64_t groups, double* scratch, int64_t begin, int64_t end) {
                                   backward(args, gradient, groups, scratch, begin, end);
                                 });
                               });
}

void group_norm_affine_(const Tensor& x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
                     double eps, std::optional<Tensor> add, std::optional<Tensor> scale, std::optional<Tensor> shift,
                     bool silu, Tensor map) {
  NormArguments args = norm_arguments(x, num_groups, weight, bias, add, scale, shift, silu);
  STD_TORCH_CHECK(map.scalar_type() == ScalarType::Float && map.is_contiguous() &&
                      map.dim() == 3 && (map.size(0) == 3 || map.size(0) == 4) && map.size(1) == args.samples &&
                      map.size(2) == args.channels,
                  "map must be contiguous float32 [3, N, C] or [4, N, C]");
  if (x.numel() == 0) return;
  args.channels_last = true;
  args.pixel = pixel_distance(x, "x");
  args.eps = eps;
  args.bounded = map.size(0) == 4;
  float* to = static_cast<float*>(map.mutable_data_ptr());
  const auto maps = kernels(args.type).maps;
  const auto call = [=] {
    each_block(args, [&](int64_t groups, double* scratch, int64_t begin, int64_t end) {
      maps(args, to, groups, scratch, begin, end);
    });
  };
  run_or_record(call, x, weight, bias, add, scale, shift, map);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&fused_diffusion::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&fused_diffusion::group_norm_silu_backward));
  m.impl("group_norm_affine_", TORCH_BOX(&fused_diffusion::group_norm_affine_));
}
