// fused_diffusion::group_norm_silu and its gradient on the CPU: blocks of whole groups of one sample, each read
// from memory once, divided among threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <memory>

#include "common/channels_last.h"
#include "common/parallel.h"
#include "group_norm_silu/args.h"
#include "runtime/recorded_calls.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

constexpr int64_t kBlockBytes = 1 << 18;         // a quarter of a core's second cache
constexpr int64_t kElementsPerThread = 1 << 15;  // like PyTorch: fewer are not worth a thread
constexpr int64_t kLineBytes = 64;               // of the cache
constexpr int64_t kChannelDoubles = 10;          // of scratch for each channel

// The kernels of one instruction set for one element type.
struct NormKernels {
  void (*forward)(const NormArguments&, void* y, int64_t groups, double* scratch, int64_t begin, int64_t end);
  void (*backward)(const NormArguments&, const NormGradient&, int64_t groups, double* scratch, int64_t begin,
                   int64_t end);
  void (*affine_maps)(const NormArguments&, float* to, int64_t groups, double* scratch, int64_t begin, int64_t end);
};

#define FD_PER_ISA "group_norm_silu/norm_cpu.h"
#define FD_ISAS (FD_ISAS_FLOAT32 | FD_ISA_AVX512_BF16)
#include "simd/foreach_isa.inc"

template <class T>
NormKernels kernels() {
  const Simd isa = simd_in_use();
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (includes(isa, Simd::avx512_bf16)) return avx512_bf16::kernels_of<T>();
  }
#endif
  return FD_DISPATCH(isa, kernels_of<T>());
}

NormKernels kernels(ScalarType type) {
  if (type == ScalarType::Float) return kernels<float>();
  return type == ScalarType::BFloat16 ? kernels<BFloat16>() : kernels<Half>();
}

// How many groups make a block: as many as fit in the cache, or fewer where threads would be idle, but always whole
// cache lines.
int64_t groups_per_block(const NormArguments& args) {
  const int64_t element = args.type == ScalarType::Float ? 4 : 2, threads = torch::stable::get_num_threads();
  const int64_t group_bytes = args.group_size() * args.positions * element;
  const int64_t row_bytes = args.channels_last ? args.group_size() * element : group_bytes;
  const int64_t min_groups = std::min(args.groups, divide_up(kLineBytes, row_bytes));
  int64_t blocks = divide_up(args.groups, std::max(min_groups, kBlockBytes / group_bytes));
  const auto idle = [&] { return args.samples * blocks < 4 * threads && args.samples * blocks % threads != 0; };
  while (idle() && 2 * blocks * min_groups <= args.groups) blocks *= 2;
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
                                                   std::optional<Tensor> bias, double eps, std::optional<Tensor> add,
                                                   std::optional<Tensor> scale, std::optional<Tensor> shift,
                                                   bool silu) {
  return checked_norm(x, num_groups, weight, bias, eps, add, scale, shift, silu,
                      [](const NormArguments& args, void* y) {
                        const auto forward = kernels(args.type).forward;
                        each_block(args, [&](int64_t groups, double* scratch, int64_t begin, int64_t end) {
                          forward(args, y, groups, scratch, begin, end);
                        });
                      });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_backward(
    const Tensor& grad, const Tensor& x, int64_t num_groups, std::optional<Tensor> weight, std::optional<Tensor> bias,
    std::optional<Tensor> add, std::optional<Tensor> scale, std::optional<Tensor> shift, bool silu, const Tensor& mean,
    const Tensor& rstd) {
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
                        bool silu, Tensor affine) {
  NormArguments args = norm_arguments(x, num_groups, weight, bias, add, scale, shift, silu);
  STD_TORCH_CHECK(affine.scalar_type() == ScalarType::Float && affine.is_contiguous() && affine.dim() == 3 &&
                      (affine.size(0) == 3 || affine.size(0) == 4) && affine.size(1) == args.samples &&
                      affine.size(2) == args.channels,
                  "affine must be contiguous float32 [3, N, C] or [4, N, C]");
  if (x.numel() == 0) return;
  args.channels_last = true;
  args.pixel = pixel_distance(x, "x");
  args.eps = eps;
  args.bounded = affine.size(0) == 4;
  float* to = static_cast<float*>(affine.mutable_data_ptr());
  const auto affine_maps = kernels(args.type).affine_maps;
  const auto call = [=] {
    each_block(args, [&](int64_t groups, double* scratch, int64_t begin, int64_t end) {
      affine_maps(args, to, groups, scratch, begin, end);
    });
  };
  run_or_record(call, x, weight, bias, add, scale, shift, affine);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("group_norm_silu", TORCH_BOX(&fused_diffusion::group_norm_silu));
  m.impl("group_norm_silu_backward", TORCH_BOX(&fused_diffusion::group_norm_silu_backward));
  m.impl("group_norm_affine_", TORCH_BOX(&fused_diffusion::group_norm_affine_));
}
