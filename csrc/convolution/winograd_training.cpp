// Winograd's convolution F(4 x 4, 3 x 3) for training in float32, whose weights change at every step (Lavin & Gray 2016,
// arXiv:1509.09308): fused_diffusion::pack_winograd packs a weight for fused_diffusion::convolution_, also that of the
// gradient of the input; fused_diffusion::winograd_weight_gradient computes the gradients of weight and bias.
//
// The transposed algorithm gives the gradient of a weight g: with y = A^T [(G g G^T) . (B^T x B)] A for a tile,
//
//   d g = G^T [sum over tiles of (B^T x B) . (A d y A^T)] G.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "common/channels_last.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "convolution/args.h"
#include "group_norm_silu/math.h"
#include "simd/dispatch.h"

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTile = 4;
constexpr int64_t kSize = kTile + 2;
constexpr int64_t kFrequencies = kSize * kSize;
constexpr int64_t kBlockFloats = 1 << 18;     // of both factors of a block: twice the second-level cache
constexpr int64_t kMaxBlockFloats = 1 << 21;  // of the same, where the sums are as many
constexpr int64_t kWorkPerThread = 1 << 14;   // vector operations, some five microseconds

// Channels that lie together in a transformed factor: a multiple of the rows and of the columns of the sums that a
// product keeps in registers. The distance from tile to tile, three cache lines, uses every set of the cache.
constexpr int64_t kTogether = 48;

// A weight [outputs, channels, 3, 3], or the same with outputs and channels exchanged and the taps in reverse order.
struct TrainedWeight {
  const float* data;
  int64_t outputs, channels;
  int64_t output_step, channel_step, row_step, column_step;  // in elements; negative for reversed taps
};

// One factor of the products at all frequencies, for the tiles of a block:
// [frequency][kTogether channels, or fewer][tile][channel].
struct TransformedFactor {
  int64_t channels, tiles;  // channels: padded to a multiple of 16
  float* data;

  // + 16: with a power of two as step, all frequencies of a tile would share one set of the cache.
  FD_HD int64_t step() const { return channels * tiles + 16; }
  FD_HD int64_t groups() const { return divide_up(channels, kTogether); }
  FD_HD int64_t width(int64_t group) const {
    const int64_t remaining = channels - group * kTogether;
    return remaining < kTogether ? remaining : kTogether;
  }
  FD_HD float* group(int64_t frequency, int64_t group) const {
    return data + frequency * step() + group * kTogether * tiles;
  }
};

// The sums over tiles: [frequency][output][channel].
struct WeightSums {
  int64_t outputs, channels, padded_channels;
  float* data;

  FD_HD int64_t step() const { return outputs * padded_channels + 16; }
};

#define FD_PER_ISA "convolution/winograd_training_cpu.h"
#define FD_ISAS FD_ISAS_FLOAT32
#include "simd/foreach_isa.inc"

// An image as the kernels that read pixels take it.
Convolution image_of(const Tensor& x, const char* name) {
  Convolution g{};
  g.x = x.const_data_ptr();
  g.images = x.size(0), g.channels = x.size(1), g.height = x.size(2), g.width = x.size(3);
  g.out_height = g.height, g.out_width = g.width;
  g.x_pixel = pixel_distance(x, name);
  g.kernel = 3, g.stride = 1, g.padding = 1, g.scale = 1;
  return g;
}

Tensor pack_winograd(const Tensor& weight, bool transposed, int64_t panel) {
  STD_TORCH_CHECK(panel == kPackedLanes || panel == kPanel, "a panel must be 16 or 64 channels wide");
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.dim() == 4 && weight.size(2) == 3 &&
                      weight.size(3) == 3 && weight.size(0) > 0 && weight.size(1) > 0,
                  "weight must be float32 [K, C, 3, 3]");
  TrainedWeight w{static_cast<const float*>(weight.const_data_ptr()),
                  weight.size(0),
                  weight.size(1),
                  weight.stride(0),
                  weight.stride(1),
                  weight.stride(2),
                  weight.stride(3)};
  if (transposed) {
    w.data += 2 * (w.row_step + w.column_step);
    std::swap(w.outputs, w.channels);
    std::swap(w.output_step, w.channel_step);
    w.row_step = -w.row_step, w.column_step = -w.column_step;
  }
  const int64_t padded = round_up(w.outputs, kPackedLanes);
  Tensor packed = torch::stable::new_empty(weight, {kFrequencies * padded * w.channels});
  float* to = static_cast<float*>(packed.mutable_data_ptr());
  const auto pack = FD_DISPATCH(simd_in_use(), pack_rows);
  divide_work(divide_up(padded, kPanel) * w.channels, kPanel * kFrequencies / 4, kWorkPerThread,
              [&](int64_t begin, int64_t end) { pack(w, panel, to, begin, end); });
  return packed;
}

std::tuple<Tensor, Tensor> winograd_weight_gradient(const Tensor& grad, const Tensor& x) {
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::Float && x.scalar_type() == ScalarType::Float,
                  "grad and x must be float32");
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4 && grad.size(0) == x.size(0) && grad.size(2) == x.size(2) &&
                      grad.size(3) == x.size(3),
                  "grad must be [N, K, H, W], and x [N, C, H, W]");
  STD_TORCH_CHECK(
      (grad.const_data_ptr() != nullptr || grad.numel() == 0) && (x.const_data_ptr() != nullptr || x.numel() == 0),
      "grad and x must have memory");
  const int64_t outputs = grad.size(1), channels = x.size(1);
  Tensor weight = torch::stable::new_empty(x, {outputs, 3, 3, channels});
  Tensor bias = torch::stable::new_empty(x, {outputs});
  torch::stable::zero_(bias);
  if (grad.numel() == 0 || x.numel() == 0) {
    torch::stable::zero_(weight);
    return {weight, bias};
  }
  const Convolution of_grad = image_of(grad, "grad"), of_x = image_of(x, "x");
  WeightSums sums{outputs, channels, round_up(channels, kPackedLanes), nullptr};
  Tensor kept = torch::stable::new_empty(x, {kFrequencies * sums.step()});
  sums.data = static_cast<float*>(kept.mutable_data_ptr());
  float* bias_sums = static_cast<float*>(bias.mutable_data_ptr());
  const Simd isa = simd_in_use();
  const auto transform = FD_DISPATCH(isa, transform_factor);
  const auto multiply = FD_DISPATCH(isa, multiply_factors);
  const auto finish = FD_DISPATCH(isa, transform_sums);
  const int64_t lanes = FD_DISPATCH(isa, kLanes);

  const int64_t padded = round_up(outputs, kPackedLanes) + sums.padded_channels;
  const int64_t wide = divide_up(of_x.width, kTile), high = divide_up(of_x.height, kTile), strips = of_x.images * high;
  // Each block reads and writes all sums, so it is as large as they are.
  const int64_t floats = std::min(std::max(kBlockFloats, kFrequencies * sums.step()), kMaxBlockFloats);
  const int64_t blocks = divide_up(strips, std::max<int64_t>(1, floats / (kFrequencies * wide * padded)));
  const int64_t strips_per_block = divide_up(strips, blocks);
  for (int64_t first = 0; first < strips; first += strips_per_block) {
    const WinogradBlock block = [&] {
      WinogradBlock b(of_x, kTile, 1, std::min(strips_per_block, strips - first));
      b.first = first;
      return b;
    }();
    TransformedFactor factors[2] = {{round_up(outputs, kPackedLanes), block.count(), nullptr},
                                    {sums.padded_channels, block.count(), nullptr}};
    const int64_t images = (first + block.strips - 1) / high - first / high + 1;
    const int64_t plane = block.plane_rows() * (wide * kTile + 2) * lanes;
    float* pixel_sums = buffer(images * factors[0].channels, 3);
    for (int i = 0; i < 2; ++i) {
      factors[i].data = buffer(kFrequencies * factors[i].step(), i);
      divide_work(images * factors[i].channels / lanes, block.count() / images * 200, kWorkPerThread,
                  [&](int64_t begin, int64_t end) {
                    transform(i == 0 ? of_grad : of_x, block, factors[i], i == 0 ? pixel_sums : nullptr,
                              buffer(plane, 2), begin, end);
                  });
    }
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t i = 0; i < outputs; ++i) bias_sums[i] += pixel_sums[image * factors[0].channels + i];
    }
    divide_work(kFrequencies * factors[0].groups(), block.count() * channels * kTogether / 16, kWorkPerThread,
                [&](int64_t begin, int64_t end) { multiply(factors[0], factors[1], sums, first == 0, begin, end); });
  }
  float* to = static_cast<float*>(weight.mutable_data_ptr());
  divide_work(outputs, sums.padded_channels * kFrequencies / 8, kWorkPerThread,
              [&](int64_t begin, int64_t end) { finish(sums, to, begin, end); });
  return {weight, bias};
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("pack_winograd", TORCH_BOX(&fused_diffusion::pack_winograd));
  m.impl("winograd_weight_gradient", TORCH_BOX(&fused_diffusion::winograd_weight_gradient));
}
