// fused_diffusion::attention_backward on CUDA. Each block computes a tile of one of dq, dk and dv. All blocks recompute
// the weights from the logsumexp, so that no sum depends on the order in which blocks run (Dao et al. 2022, algorithm
// 4, without its sum over blocks in global memory).
#include <torch/csrc/stable/library.h>

#include "attention/blocks.h"

namespace fused_diffusion {
namespace {

// With weights p = exp(q k^T scale - logsumexp) and their gradients ds = p (grad v^T - delta):
//     dq = scale ds k    dk = scale ds^T q    dv = p^T grad
enum class Of { queries, keys, values };  // the tensor whose gradient a block computes

// Two warps share 16 of the block's 32 rows; each takes half of the columns of every tile.
template <class T, int kWidth>
struct BackwardShape {
  static constexpr int kColumnWarps = 2, kRows = kWarpRows * kWarps / kColumnWarps;
  static constexpr int kTile = sizeof(T) == 2 ? 64 : 32, kColumns = kTile / kColumnWarps, kStages = 2;
  static constexpr int kTileBytes = (2 * kRows + kStages * kTile) * kPitch<T, kWidth> * static_cast<int>(sizeof(T));
  static constexpr int kSumBytes = kWarps * kWarpRows * kSumPitch<kWidth> * static_cast<int>(sizeof(float));
  static constexpr int kLoopBytes = kTileBytes + (kRows > kTile ? kRows : kTile) * 2 * static_cast<int>(sizeof(float));
  static constexpr int kSharedBytes = kLoopBytes > kSumBytes ? kLoopBytes : kSumBytes;
};

// delta: [B, H, S], the sum over the width of out * grad. A warp computes one row.
template <class T>
__global__ void __launch_bounds__(kBlock) delta_kernel(const AttentionGradientArguments g, float* delta) {
  const int lane = threadIdx.x % 32;
  const int64_t at = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int64_t head = at / g.positions, row = at % g.positions, b = head / g.heads, h = head % g.heads;
  if (b >= g.batch) return;
  const T* out = g.out.at<const T>(b, h) + row * g.out.row;
  const T* grad = g.grad.at<const T>(b, h) + row * g.grad.row;
  float sum = 0.0f;
  for (int d = lane; d < static_cast<int>(g.width); d += 32) {
    sum = HardwareFma::fma(to_float(out[d]), to_float(grad[d]), sum);
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  if (lane == 0) delta[at] = sum;
}

struct alignas(8) QueryStatistics {
  float logsumexp, delta;
};

// Copies the statistics of kCount queries from `first` on to shared memory.
template <int kCount>
__device__ __forceinline__ void copy_statistics(QueryStatistics* to, const float* logsumexp, const float* delta,
                                                int64_t first, int64_t positions) {
  static_assert(kCount <= kBlock, "each thread copies one");
  const int i = threadIdx.x;
  if (i < kCount)
    to[i] = first + i < positions ? QueryStatistics{logsumexp[first + i], delta[first + i]} : QueryStatistics{};
}

// Rows of the products are queries for dq, else keys; columns are keys for dq, else queries.
template <Of kOf, class T, int kWidth>
__device__ __forceinline__ void gradient(const AttentionGradientArguments& g, const float* delta, bool vector) {
  using P = Products<T>;
  using S = BackwardShape<T, kWidth>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, width = static_cast<int>(g.width);
  const BlockPlace place(g.heads, g.positions, S::kRows);
  const int64_t b = place.b, h = place.h;
  const int64_t at = place.head * g.positions;

  // For each pair of tiles: the rows' products with a tile of one tensor; then the rows' products with the tile of the
  // other tensor, whose rows are added up with the resulting weights.
  const HeadRows<T> q(g.q, b, h), k(g.k, b, h), v(g.v, b, h), grad(g.grad, b, h);
  T* left_first = reinterpret_cast<T*>(shared_memory);
  T* left_second = left_first + S::kRows * kPitch<T, kWidth>;
  copy_tile<S::kRows, kWidth>(left_first,
                              kOf == Of::queries ? grad
                              : kOf == Of::keys  ? v
                                                 : k,
                              place.first, g.positions, width, vector);
  if (kOf != Of::values) {
    copy_tile<S::kRows, kWidth>(left_second, kOf == Of::queries ? q : k, place.first, g.positions, width, vector);
  }
  Ring<T, kWidth, S::kTile, S::kStages> ring(left_second + S::kRows * kPitch<T, kWidth>,
                                             kOf == Of::queries ? v
                                             : kOf == Of::keys  ? grad
                                                                : q,
                                             kOf == Of::queries ? k
                                             : kOf == Of::keys  ? q
                                                                : grad,
                                             0, g.positions, width, vector);
  auto* statistics = reinterpret_cast<QueryStatistics*>(shared_memory + S::kTileBytes);
  if (kOf == Of::queries) {
    copy_statistics<S::kRows>(statistics, g.logsumexp + at, delta + at, place.first, g.positions);
  }
  const int first_row = warp / S::kColumnWarps * kWarpRows, first_column = warp % S::kColumnWarps * S::kColumns;
  const int left = first_row * kPitch<T, kWidth>;
  Product<kWidth> sum = {};
  for (int tile = 0; int64_t{tile} * S::kTile < g.positions; ++tile) {
    const int64_t column = int64_t{tile} * S::kTile;
    Product<S::kColumns> first = {}, weights = {};
    const T* rows = ring.wait(2 * tile) + first_column * kPitch<T, kWidth>;
    P::template multiply<kWidth>(first, left_first + left, rows, lane);
    if (kOf != Of::queries) {
      copy_statistics<S::kTile>(statistics, g.logsumexp + at, delta + at, column, g.positions);
    }
    rows = ring.wait(2 * tile + 1) + first_column * kPitch<T, kWidth>;
    if (kOf == Of::values) {
      weights = first;
    } else {
      P::template multiply<kWidth>(weights, left_second + left, rows, lane);
    }
    const bool ends = column + S::kTile > g.positions;
#pragma unroll
    for (int n = 0; n < S::kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = first_row + P::row(lane, P::lane_row(i)), c = first_column + P::column(lane, n, i);
        const QueryStatistics query = statistics[kOf == Of::queries ? r : c];
        float& weight = weights.at[n][i];
        weight = P::exp(HardwareFma::fma(weight, g.scale, -query.logsumexp));
        if (kOf != Of::values) weight *= first.at[n][i] - query.delta;
        if (ends && column + c >= g.positions) weight = 0.0f;
      }
    }
    P::template accumulate<kWidth>(sum, weights, rows, lane);
  }

  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared_memory);
  store_sum<P>(sums, sum, warp, lane);
  __syncthreads();
  // The softmax of one logit is the constant 1.
  const float factor = kOf == Of::values ? 1.0f : g.positions == 1 ? 0.0f : g.scale;
  const OutputHeads& to = kOf == Of::queries ? g.dq : kOf == Of::keys ? g.dk : g.dv;
  for (int row = warp; row < S::kRows && place.first + row < g.positions; row += kWarps) {
    const float* from = sums + (row / kWarpRows * S::kColumnWarps * kWarpRows + row % kWarpRows) * kSumPitch<kWidth>;
    for (int d = lane; d < width; d += 32) {
      float value = from[d];
#pragma unroll
      for (int w = 1; w < S::kColumnWarps; ++w) value += from[w * kWarpRows * kSumPitch<kWidth> + d];
      from_float(value * factor, to.at<T>(b, h)[(place.first + row) * to.row + d]);
    }
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kBlock, kBlocks<kWidth>)
    gradient_kernel(const AttentionGradientArguments g, const float* delta, bool vector) {
  if (blockIdx.y == 0) {
    gradient<Of::queries, T, kWidth>(g, delta, vector);
  } else if (blockIdx.y == 1) {
    gradient<Of::keys, T, kWidth>(g, delta, vector);
  } else {
    gradient<Of::values, T, kWidth>(g, delta, vector);
  }
}

struct CudaAttentionGradient {
  const Tensor& q;

  template <class T>
  void operator()(const AttentionGradientArguments& g, T*) const {
    const int64_t heads = g.batch * g.heads;
    Tensor deltas = torch::stable::new_empty(q, {heads * g.positions}, ScalarType::Float);
    float* delta = static_cast<float*>(deltas.mutable_data_ptr());
    launch(delta_kernel<T>, grid_of(divide_up(heads * g.positions, kWarps)), kBlock, 0, current_stream(q), g, delta);
    const auto packed = [&](const InputHeads& t) {
      return in_packs(t, g.batch, g.heads, g.positions, g.width * sizeof(T), sizeof(T));
    };
    with_width(g.width, [&](auto width) {
      using S = BackwardShape<T, decltype(width)::value>;
      static_assert(S::kSharedBytes <= kWideSharedMemory, "kernels.attention asks for so much");
      const dim3 grid = grid_of(heads * divide_up(g.positions, S::kRows), 3);
      launch(gradient_kernel<T, decltype(width)::value>, grid, kBlock, S::kSharedBytes, current_stream(q), g,
             static_cast<const float*>(delta), packed(g.q) && packed(g.k) && packed(g.v) && packed(g.grad));
    });
  }
};

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& logsumexp,
                                                      double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  return checked_attention_gradient(grad, q, k, v, out, logsumexp, scale, CudaAttentionGradient{q});
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("attention_backward", TORCH_BOX(&fused_diffusion::attention_backward));
  m.impl("attention_wgmma_backward", TORCH_BOX(&fused_diffusion::attention_backward));
}
