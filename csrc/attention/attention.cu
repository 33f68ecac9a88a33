// fused_diffusion::attention on CUDA: tiles of queries in shared memory, the softmax online over tiles of keys.
//
// A block has four warps. With many queries each warp takes 16 of the block's 64 queries. With few, all four take the
// same 16 queries and divide the keys, so that a batch of 1 still fills the device; their softmaxes are merged at the
// end.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "attention/blocks.h"

namespace fused_diffusion {
namespace {

// kKeyWarps warps divide the keys of each tile; a block has kWarps / kKeyWarps times 16 queries. Blocks of few queries
// wait for memory more than they compute, so their tiles are larger, or more tiles are on their way at a time.
template <class T, int kWidth, int kKeyWarps>
struct ForwardShape {
  static constexpr bool kFew = kKeyWarps > 1, kShort = sizeof(T) == 2;
  static constexpr int kQueries = kWarpRows * kWarps / kKeyWarps;
  static constexpr int kTile = kShort || kFew ? 64 : 32;  // keys
  static constexpr int kStages = kShort && kFew ? 4 : 2;
  static constexpr int kColumns = kTile / kKeyWarps;  // keys to a warp
  static constexpr int kStates = kWarps * kWarpRows;
  static constexpr int kTileBytes = (kQueries + kStages * kTile) * kPitch<T, kWidth> * static_cast<int>(sizeof(T));
  static constexpr int kStateBytes = kStates * (kSumPitch<kWidth> + 2) * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kTileBytes > kStateBytes ? kTileBytes : kStateBytes;
};

// The softmax of a warp's 16 queries. For each query: the largest product with a key; the sum of the weights relative
// to that maximum, of which each lane has a part; and the sum of the weighted values.
template <class P, int kWidth>
struct WarpSoftmax {
  float maximum[P::kLaneRows], sum[P::kLaneRows];
  Product<kWidth> values;
};

// Adds kColumns keys, of which the first `keys` exist, to the softmax: products with the queries, of which a unit is a
// factor of 2^octaves of a weight, and values.
template <class P, int kWidth, int kColumns, class T>
__device__ __forceinline__ void add_to_softmax(WarpSoftmax<P, kWidth>& softmax, Product<kColumns>& products,
                                               const T* values, float octaves, int keys, int lane) {
  if (keys < kColumns) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (P::column(lane, n, i) >= keys) products.at[n][i] = kNoMaximum;
      }
    }
  }
  float largest[P::kLaneRows], base[P::kLaneRows], factor[P::kLaneRows];
#pragma unroll
  for (int r = 0; r < P::kLaneRows; ++r) largest[r] = softmax.maximum[r];
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) largest[P::lane_row(i)] = fmaxf(largest[P::lane_row(i)], products.at[n][i]);
  }
#pragma unroll
  for (int r = 0; r < P::kLaneRows; ++r) {
    largest[r] = row_maximum<P>(largest[r]);
    base[r] = largest[r] == kNoMaximum ? 0.0f : largest[r];
    factor[r] = rescale(softmax.maximum[r], largest[r], octaves);
    softmax.maximum[r] = largest[r];
    softmax.sum[r] *= factor[r];
  }
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) softmax.values.at[n][i] *= factor[P::lane_row(i)];
  }
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& weight = products.at[n][i];
      weight = P::exp2((weight - base[P::lane_row(i)]) * octaves);
      if (keys < kColumns && P::column(lane, n, i) >= keys) weight = 0.0f;  // with octaves = 0 the weight above is NaN
      softmax.sum[P::lane_row(i)] += weight;
    }
  }
  P::template accumulate<kWidth>(softmax.values, products, values, lane);
}

// Merges the softmaxes of the warps that share queries, and writes the outputs. All of `shared` is overwritten.
template <class P, class T, int kWidth, int kKeyWarps>
__device__ __forceinline__ void merge(WarpSoftmax<P, kWidth>& softmax, float* shared, const AttentionArguments& g,
                                      const BlockPlace& place, float octaves, int warp, int lane) {
  using S = ForwardShape<T, kWidth, kKeyWarps>;
  float* maxima = shared + S::kStates * kSumPitch<kWidth>;
  float* sums = maxima + S::kStates;
  store_sum<P>(shared, softmax.values, warp, lane);
#pragma unroll
  for (int r = 0; r < P::kLaneRows; ++r) {
    const int at = kWarpRows * warp + P::row(lane, r);
    const float sum = row_sum<P>(softmax.sum[r]);
    if (lane % P::kRowLanes == 0) {
      maxima[at] = softmax.maximum[r];
      sums[at] = sum;
    }
  }
  __syncthreads();
  T* out = g.out.at<T>(place.b, place.h);
  for (int row = warp; row < S::kQueries && place.first + row < g.positions; row += kWarps) {
    const int from =
        row / kWarpRows * kKeyWarps * kWarpRows + row % kWarpRows;  // the row in the first of the warps that share it
    float largest = kNoMaximum, sum = 0.0f, factors[kKeyWarps];
#pragma unroll
    for (int w = 0; w < kKeyWarps; ++w) largest = fmaxf(largest, maxima[from + kWarpRows * w]);
#pragma unroll
    for (int w = 0; w < kKeyWarps; ++w) {
      factors[w] = rescale(maxima[from + kWarpRows * w], largest, octaves);
      sum = HardwareFma::fma(sums[from + kWarpRows * w], factors[w], sum);
    }
    for (int d = lane; d < static_cast<int>(g.width); d += 32) {
      float value = 0.0f;
#pragma unroll
      for (int w = 0; w < kKeyWarps; ++w) {
        value = HardwareFma::fma(shared[(from + kWarpRows * w) * kSumPitch<kWidth> + d], factors[w], value);
      }
      from_float(value / sum, out[(place.first + row) * g.out.row + d]);
    }
    if (lane == 0) {
      g.logsumexp[place.head * g.positions + place.first + row] = HardwareFma::fma(largest, fabsf(g.scale), logf(sum));
    }
  }
}

template <class T, int kWidth, int kKeyWarps>
__global__ void __launch_bounds__(kBlock, kBlocks<kWidth>) attention_kernel(const AttentionArguments g, bool vector) {
  using P = Products<T>;
  using S = ForwardShape<T, kWidth, kKeyWarps>;
  T* queries = reinterpret_cast<T*>(shared_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = static_cast<int>(g.width);
  const int first_key = warp % kKeyWarps * S::kColumns;  // of the warp, in a tile
  const BlockPlace place(g.heads, g.positions, S::kQueries);
  const float octaves = fabsf(g.scale) * kLog2E;

  WarpSoftmax<P, kWidth> softmax = {};
#pragma unroll
  for (int r = 0; r < P::kLaneRows; ++r) softmax.maximum[r] = kNoMaximum;
  copy_tile<S::kQueries, kWidth>(queries, HeadRows<T>(g.q, place.b, place.h), place.first, g.positions, width, vector);
  Ring<T, kWidth, S::kTile, S::kStages> ring(queries + S::kQueries * kPitch<T, kWidth>,
                                             HeadRows<T>(g.k, place.b, place.h), HeadRows<T>(g.v, place.b, place.h),
                                             g.positions, width, vector);
  const T* left = queries + warp / kKeyWarps * kWarpRows * kPitch<T, kWidth>;
  for (int tile = 0; int64_t{tile} * S::kTile < g.positions; ++tile) {
    const T* keys = ring.wait(2 * tile) + first_key * kPitch<T, kWidth>;
    Product<S::kColumns> products = {};
    P::template multiply<kWidth>(products, left, keys, lane);
    if (g.scale < 0.0f) {
#pragma unroll
      for (int n = 0; n < S::kColumns / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) products.at[n][i] = -products.at[n][i];
      }
    }
    const T* values = ring.wait(2 * tile + 1) + first_key * kPitch<T, kWidth>;
    const int64_t remaining = g.positions - int64_t{tile} * S::kTile - first_key;
    const int existing = remaining < S::kColumns ? static_cast<int>(remaining) : S::kColumns;
    add_to_softmax<P>(softmax, products, values, octaves, existing, lane);
  }
  __syncthreads();
  merge<P, T, kWidth, kKeyWarps>(softmax, reinterpret_cast<float*>(shared_memory), g, place, octaves, warp, lane);
}

struct CudaAttention {
  const Tensor& q;

  template <class T>
  void operator()(const AttentionArguments& g, T*) const {
    with_width(g.width, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const int64_t many = g.batch * g.heads * divide_up(g.positions, ForwardShape<T, kWidth, 1>::kQueries);
      if (many >= multiprocessors()) {
        run<T, kWidth, 1>(g);
      } else {
        run<T, kWidth, kWarps>(g);
      }
    });
  }

  template <class T, int kWidth, int kKeyWarps>
  void run(const AttentionArguments& g) const {
    using S = ForwardShape<T, kWidth, kKeyWarps>;
    static_assert(S::kSharedBytes <= kWideSharedMemory, "kernels.attention asks for so much");
    const auto packed = [&](const InputHeads& t) {
      return in_packs(t, g.batch, g.heads, g.positions, g.width * sizeof(T), sizeof(T));
    };
    const int64_t blocks = g.batch * g.heads * divide_up(g.positions, S::kQueries);
    launch(attention_kernel<T, kWidth, kKeyWarps>, grid_of(blocks), kBlock, S::kSharedBytes, current_stream(q), g,
           packed(g.q) && packed(g.k) && packed(g.v));
  }
};

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  return checked_attention(q, k, v, scale, CudaAttention{q});
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) { m.impl("attention", TORCH_BOX(&fused_diffusion::attention)); }
