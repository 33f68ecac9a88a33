// fused_diffusion::attention on CUDA: tiles of queries in shared memory, the softmax online over tiles of keys.
//
// A block has four warps. With many queries each warp takes 16 of the block's 64 queries. With few, all four take the
// same 16 queries and divide the keys; their softmaxes are merged at the end. Where even these blocks leave most of the
// device idle, the keys of a head are divided among several blocks too, and a second kernel merges their softmaxes
// ("Flash-Decoding for long-context inference", Dao et al. 2023).
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "attention/blocks.h"
#include "attention/forward.h"
#include "attention/softmax.h"

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

// The keys in `count` parts, a block for each. values: float [count][B * H * S][D], sums and maxima: float
// [count][B * H * S], the softmax of each part; null where there is one part.
struct KeyParts {
  int64_t count, keys;  // keys: of a part, whole tiles
  float *values, *sums, *maxima;
};

// Merges the softmaxes of the warps that share queries, and writes the outputs, or the softmax of this part of the
// keys. All of `shared` is overwritten.
template <class P, class T, int kWidth, int kKeyWarps>
__device__ __forceinline__ void merge(WarpSoftmax<P, kWidth>& softmax, float* shared, const AttentionArguments& g,
                                      const KeyParts& parts, const BlockPlace& place, float octaves, int warp,
                                      int lane) {
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
  const int width = static_cast<int>(g.width);
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
    const int64_t query = place.head * g.positions + place.first + row;
    const int64_t at = blockIdx.y * g.batch * g.heads * g.positions + query;  // in a part
    T* out = g.out.at<T>(place.b, place.h) + (place.first + row) * g.out.row;
    const float inverse = 1.0f / sum;
    for (int d = 4 * lane; d < width; d += 4 * 32) {
      float value[4] = {};
#pragma unroll
      for (int w = 0; w < kKeyWarps; ++w) {
        float of_warp[4];
        load4(of_warp, shared + (from + kWarpRows * w) * kSumPitch<kWidth> + d, 4, true);
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] = HardwareFma::fma(of_warp[i], factors[w], value[i]);
      }
      if (S::kFew && parts.count > 1) {
        store4(parts.values + at * width + d, value, width - d, width % 4 == 0);
      } else {
        store_output(out, value, inverse, d, width);
      }
    }
    if (S::kFew && lane == 0 && parts.count > 1) {
      parts.maxima[at] = largest;
      parts.sums[at] = sum;
    } else if (lane == 0) {
      g.logsumexp[query] = HardwareFma::fma(largest, fabsf(g.scale), logf(sum));
    }
  }
}

template <class T, int kWidth, int kKeyWarps>
__global__ void __launch_bounds__(kBlock, kBlocks<kWidth>) attention_kernel(const AttentionArguments g,
                                                                             const KeyParts parts, bool vector) {
  using P = Products<T>;
  using S = ForwardShape<T, kWidth, kKeyWarps>;
  T* queries = reinterpret_cast<T*>(shared_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = static_cast<int>(g.width);
  const int first_key = warp % kKeyWarps * S::kColumns;  // of the warp, in a tile
  const BlockPlace place(g.heads, g.positions, S::kQueries);
  const float octaves = fabsf(g.scale) * kLog2E;
  int64_t begin = 0, end = g.positions;  // of the keys of this part
  if (S::kFew) {
    begin = blockIdx.y * parts.keys;
    end = begin + parts.keys < end ? begin + parts.keys : end;
  }

  WarpSoftmax<P, kWidth> softmax = {};
#pragma unroll
  for (int r = 0; r < P::kLaneRows; ++r) softmax.maximum[r] = kNoMaximum;
  copy_tile<S::kQueries, kWidth>(queries, HeadRows<T>(g.q, place.b, place.h), place.first, g.positions, width, vector);
  Ring<T, kWidth, S::kTile, S::kStages> ring(queries + S::kQueries * kPitch<T, kWidth>,
                                             HeadRows<T>(g.k, place.b, place.h), HeadRows<T>(g.v, place.b, place.h),
                                             begin, end, width, vector);
  const T* left = queries + warp / kKeyWarps * kWarpRows * kPitch<T, kWidth>;
  for (int tile = 0; begin + int64_t{tile} * S::kTile < end; ++tile) {
    const T* keys = ring.wait(2 * tile) + first_key * kPitch<T, kWidth>;
    Product<S::kColumns> products = {};
    P::template multiply<kWidth>(products, left, keys, lane);
    if (g.scale < 0.0f) negate(products);
    const T* values = ring.wait(2 * tile + 1) + first_key * kPitch<T, kWidth>;
    const int64_t remaining = end - begin - int64_t{tile} * S::kTile - first_key;
    const int existing = remaining < S::kColumns ? static_cast<int>(remaining) : S::kColumns;
    add_to_softmax<P>(softmax, products, octaves, existing, lane);
    P::template accumulate<kWidth>(softmax.values, products, values, lane);
  }
  __syncthreads();
  merge<P, T, kWidth, kKeyWarps>(softmax, reinterpret_cast<float*>(shared_memory), g, parts, place, octaves, warp,
                                  lane);
}

// Merges the softmaxes of the parts of the keys in their order, a warp for each query.
template <class T>
__global__ void __launch_bounds__(kBlock) merge_parts_kernel(const AttentionArguments g, const KeyParts parts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = static_cast<int>(g.width);
  const int count = static_cast<int>(parts.count);
  const int64_t rows = g.batch * g.heads * g.positions, query = int64_t{blockIdx.x} * kWarps + warp;
  if (query >= rows) return;
  const int64_t head = query / g.positions, b = head / g.heads, h = head % g.heads;

  // A lane has one part's maximum and sum.
  const float maximum = lane < count ? parts.maxima[lane * rows + query] : kNoMaximum;
  float largest = maximum;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, offset));
  const float factor = rescale(maximum, largest, fabsf(g.scale) * kLog2E);
  const float weighted = lane < count ? parts.sums[lane * rows + query] * factor : 0.0f;
  float sum = 0.0f;
  for (int part = 0; part < count; ++part) sum += __shfl_sync(~0u, weighted, part);

  T* out = g.out.at<T>(b, h) + (query - head * g.positions) * g.out.row;
  const float inverse = 1.0f / sum;
  for (int first = 0; first < width; first += 4 * 32) {
    const int d = first + 4 * lane;
    float value[4] = {};
    for (int part = 0; part < count; ++part) {
      const float scaled = __shfl_sync(~0u, factor, part);
      if (d < width) {
        float of_part[4];
        load4(of_part, parts.values + (part * rows + query) * width + d, width - d, width % 4 == 0);
#pragma unroll
        for (int i = 0; i < 4; ++i) value[i] = HardwareFma::fma(of_part[i], scaled, value[i]);
      }
    }
    if (d < width) store_output(out, value, inverse, d, width);
  }
  if (lane == 0) g.logsumexp[query] = HardwareFma::fma(largest, fabsf(g.scale), logf(sum));
}

// The number of tiles of keys of a block: all, unless multiprocessors would be idle and a block would read at least
// kLeastSaved bytes less. kernels/ops/attention/native.py has the same rule.
constexpr int64_t kMostParts = 32, kLeastSaved = 128 << 10;

inline int64_t tiles_of_part(int64_t blocks, int64_t tiles, int64_t tile_bytes, int64_t processors) {
  const int64_t parts = std::clamp<int64_t>(processors / blocks, 1, kMostParts);
  const int64_t fewer = divide_up(tiles, parts);
  return (tiles - fewer) * tile_bytes < kLeastSaved ? tiles : fewer;
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
    const int64_t rows = g.batch * g.heads * g.positions, tiles = divide_up(g.positions, S::kTile);
    const int64_t blocks = g.batch * g.heads * divide_up(g.positions, S::kQueries);
    const int64_t tile_bytes = 2 * S::kTile * kWidth * sizeof(T);
    const int64_t of_part = S::kFew ? tiles_of_part(blocks, tiles, tile_bytes, multiprocessors()) : tiles;
    KeyParts parts{divide_up(tiles, of_part), of_part * S::kTile, nullptr, nullptr, nullptr};
    Tensor room;  // of the current stream: what follows on it may have the memory next
    if (parts.count > 1) {
      room = torch::stable::new_empty(q, {parts.count * rows * (g.width + 2)}, ScalarType::Float);
      parts.values = static_cast<float*>(room.mutable_data_ptr());
      parts.sums = parts.values + parts.count * rows * g.width;
      parts.maxima = parts.sums + parts.count * rows;
    }
    launch(attention_kernel<T, kWidth, kKeyWarps>, grid_of(blocks, static_cast<unsigned>(parts.count)), kBlock,
           S::kSharedBytes, current_stream(q), g, parts, packed(g.q) && packed(g.k) && packed(g.v));
    if (parts.count > 1) {
      launch(merge_parts_kernel<T>, grid_of(divide_up(rows, kWarps)), kBlock, 0, current_stream(q), g, parts);
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> attention_mma(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  return checked_attention(q, k, v, scale, CudaAttention{q});
}

}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("attention", TORCH_BOX(&fused_diffusion::attention_mma));
}
