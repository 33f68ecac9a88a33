// fused_diffusion::attention_wgmma: the same as `attention`, by the instructions that only compute capability 9.0 has.
//
// A block takes 128 queries, 64 for each of two groups of four warps, which multiply whole tiles of keys and values in
// shared memory. A thread of a third group has the copy engine fetch these tiles, as far ahead as there are buffers.
// This group gives its registers to the others. While one group computes its softmax, the other has the tensor cores.
// Compare "FlashAttention-3", Shah et al. 2024, arXiv:2407.08608.
//
// A tile is stored in columns of 64 numbers, one after the other: kRows rows of 128 bytes each, swizzled as
// cuda/hopper.h says.
#include <torch/csrc/stable/library.h>

#include "attention/blocks.h"
#include "attention/forward.h"
#include "attention/softmax.h"
#include "cuda/hopper.h"
#include "cuda/tensor_map.h"

namespace fused_diffusion {
namespace {

constexpr int kGroups = 2, kGroupWarps = 4, kGroupQueries = kGroupWarps * kWarpRows;
constexpr int kCopyWarp = kGroups * kGroupWarps;  // the warps before it compute
constexpr int kWideBlock = 32 * (kCopyWarp + kGroupWarps);

template <int kRows>
constexpr int kColumnBytes = kRows * kSwizzledRow;  // of 64 columns

template <int kRows, int kWidth>
constexpr int kTileBytes = kColumnBytes<kRows> * (kWidth / 64);

// In shared memory: the queries, then the buffers, through which tiles of keys and of values go in turn, then a barrier
// for the queries and, for each buffer, one that it is full and one that it is free.
template <int kWidth>
struct WideShape {
  static constexpr int kQueries = kGroups * kGroupQueries;
  static constexpr int kKeys = kWidth == 256 ? 64 : 128;  // of a tile; registers suffice for no more
  static constexpr int kBuffers = 4;
  static constexpr int kQueryBytes = kTileBytes<kQueries, kWidth>, kKeyBytes = kTileBytes<kKeys, kWidth>;
  static constexpr int kSharedBytes =
      kQueryBytes + kBuffers * kKeyBytes + (1 + 2 * kBuffers) * static_cast<int>(sizeof(Barrier));
};

template <int kWidth>
struct WideMemory {
  using S = WideShape<kWidth>;
  unsigned char *queries, *buffers;
  Barrier *queries_full, *full, *free;

  __device__ explicit WideMemory(unsigned char* memory)
      : queries(memory),
        buffers(memory + S::kQueryBytes),
        queries_full(reinterpret_cast<Barrier*>(buffers + S::kBuffers * S::kKeyBytes)),
        full(queries_full + 1),
        free(full + S::kBuffers) {}

  // Turn 2 t is tile t of the keys, turn 2 t + 1 that of the values.
  __device__ unsigned char* buffer(int turn) const { return buffers + turn % S::kBuffers * S::kKeyBytes; }
  __device__ static int round(int turn) { return turn / S::kBuffers; }
};

// The third group: one thread copies the block's queries, and all keys and values of the head.
template <int kWidth>
__device__ __forceinline__ void copy_tiles(const WideMemory<kWidth>& memory, const CUtensorMap& q, const CUtensorMap& k,
                                           const CUtensorMap& v, const BlockPlace& place, int tiles) {
  using S = WideShape<kWidth>;
  const int h = static_cast<int>(place.h), b = static_cast<int>(place.b);
  give_registers<24>();  // of the 168 that each of 384 threads begins with: 3 x 168 = 24 + 2 x 240
  if (threadIdx.x != 32 * kCopyWarp) return;
  arrive_and_expect(memory.queries_full, S::kQueryBytes);
  for (int c = 0; c < kWidth / 64; ++c) {
    copy_box(memory.queries + c * kColumnBytes<S::kQueries>, q, memory.queries_full, 64 * c,
             static_cast<int>(place.first), h, b);
  }
  for (int turn = 0; turn < 2 * tiles; ++turn) {
    const int index = turn % S::kBuffers;
    wait_for_phase(memory.free + index, (memory.round(turn) + 1) % 2);
    arrive_and_expect(memory.full + index, S::kKeyBytes);
    for (int c = 0; c < kWidth / 64; ++c) {
      copy_box(memory.buffer(turn) + c * kColumnBytes<S::kKeys>, turn % 2 == 0 ? k : v, memory.full + index, 64 * c,
               turn / 2 * S::kKeys, h, b);
    }
  }
}

// products = queries keys^T: the queries of a group, all keys of a tile.
template <int kWidth, class T>
__device__ __forceinline__ void multiply_tile(Product<WideShape<kWidth>::kKeys>& products, const unsigned char* queries,
                                              const unsigned char* keys, T type) {
  using S = WideShape<kWidth>;
  const uint64_t left = describe_matrix(queries, kSwizzledRows * kSwizzledRow, 16);
  const uint64_t right = describe_matrix(keys, kSwizzledRows * kSwizzledRow, 16);
  fence_products();
#pragma unroll
  for (int d = 0; d < kWidth; d += kMatrixDepth) {
    multiply_rows(products.at, advance(left, d / 64 * kColumnBytes<S::kQueries> + d % 64 * 2),
                  advance(right, d / 64 * kColumnBytes<S::kKeys> + d % 64 * 2), d > 0, type);
  }
  commit_products();
  wait_for_products<0>(products.at);
}

// sum += weights values, the weights rounded to T.
template <int kWidth, class T>
__device__ __forceinline__ void accumulate_tile(Product<kWidth>& sum,
                                                const Product<WideShape<kWidth>::kKeys>& weights,
                                                const unsigned char* values, T type) {
  using S = WideShape<kWidth>;
  uint32_t rounded[S::kKeys / kMatrixDepth][4];
#pragma unroll
  for (int k = 0; k < S::kKeys / kMatrixDepth; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float (&pair)[4] = weights.at[2 * k + i / 2];
      rounded[k][i] = round_pair(pair[i % 2 * 2], pair[i % 2 * 2 + 1], type);
    }
  }
  const uint64_t right = describe_matrix(values, kSwizzledRows * kSwizzledRow, kColumnBytes<S::kKeys>);
  fence_products();
#pragma unroll
  for (int k = 0; k < S::kKeys / kMatrixDepth; ++k) {
    multiply_columns(sum.at, rounded[k], advance(right, k * kMatrixDepth * kSwizzledRow), type);
  }
  commit_products();
  wait_for_products<0>(sum.at);
}

template <class P, class T, int kWidth>
__device__ __forceinline__ void write_outputs(const WarpSoftmax<P, kWidth>& softmax, const AttentionArguments& g,
                                              const BlockPlace& place, int64_t first, int lane) {
#pragma unroll
  for (int r = 0; r < P::kLaneRows; ++r) {
    const int64_t row = first + P::row(lane, r);
    const float sum = row_sum<P>(softmax.sum[r]), inverse = 1.0f / sum;
    T* out = g.out.at<T>(place.b, place.h) + row * g.out.row;
#pragma unroll
    for (int n = 0; n < kWidth / 8; n += 4) {
      uint32_t pairs[4];
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const float (&at)[4] = softmax.values.at[n + m];
        pairs[m] = round_pair(at[2 * r] * inverse, at[2 * r + 1] * inverse, T{});
      }
      transpose(pairs, lane);
      const int column = 8 * (n + lane % 4);
      if (row < g.positions && column < g.width) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
      }
    }
    if (row < g.positions && lane % 4 == 0) {
      g.logsumexp[place.head * g.positions + row] = HardwareFma::fma(softmax.maximum[r], fabsf(g.scale), logf(sum));
    }
  }
}

// A warp of those that compute: the outputs of its 16 queries.
template <class T, int kWidth>
__device__ __forceinline__ void attend(const WideMemory<kWidth>& memory, const AttentionArguments& g,
                                       const BlockPlace& place, int tiles, int warp, int lane) {
  using P = TensorCores<T>;
  using S = WideShape<kWidth>;
  take_registers<240>();
  const int group = warp / kGroupWarps;
  const unsigned char* queries = memory.queries + group * kGroupQueries * kSwizzledRow;
  const float octaves = fabsf(g.scale) * kLog2E;
  WarpSoftmax<P, kWidth> softmax = {};
#pragma unroll
  for (int r = 0; r < P::kLaneRows; ++r) softmax.maximum[r] = kNoMaximum;
  wait_for_phase(memory.queries_full, 0);
  for (int tile = 0; tile < tiles; ++tile) {
    const int turn = 2 * tile, of_keys = turn % S::kBuffers, of_values = of_keys + 1, parity = memory.round(turn) % 2;
    Product<S::kKeys> products;
    wait_for_phase(memory.full + of_keys, parity);
    multiply_tile<kWidth>(products, queries, memory.buffer(turn), T{});
    if (lane == 0) arrive(memory.free + of_keys);
    if (g.scale < 0.0f) negate(products);
    const int64_t remaining = g.positions - int64_t{tile} * S::kKeys;
    add_to_softmax<P>(softmax, products, octaves, remaining < S::kKeys ? static_cast<int>(remaining) : S::kKeys, lane);
    wait_for_phase(memory.full + of_values, parity);
    accumulate_tile(softmax.values, products, memory.buffer(turn + 1), T{});
    if (lane == 0) arrive(memory.free + of_values);
  }
  write_outputs<P, T>(softmax, g, place, place.first + warp * kWarpRows, lane);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kWideBlock, 1)
    attention_wgmma_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                           const __grid_constant__ CUtensorMap v, const AttentionArguments g) {
  using S = WideShape<kWidth>;
  const WideMemory<kWidth> memory(swizzled_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const BlockPlace place(g.heads, g.positions, S::kQueries);
  const int tiles = static_cast<int>(divide_up(g.positions, S::kKeys));

  if (threadIdx.x == 0) {
    init_barrier(memory.queries_full, 1);
    for (int i = 0; i < S::kBuffers; ++i) {
      init_barrier(memory.full + i, 1);
      init_barrier(memory.free + i, kCopyWarp);
    }
    publish_barriers();
  }
  __syncthreads();
  if (warp >= kCopyWarp) {
    copy_tiles(memory, q, k, v, place, tiles);
  } else {
    attend<T>(memory, g, place, tiles, warp, lane);
  }
}

template <class T>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<T, Half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Whether the copy engine can fetch boxes of this tensor.
bool can_be_mapped(const Tensor& t) {
  if (t.dim() != 4 || t.scalar_type() == ScalarType::Float) return false;
  for (int d = 0; d < 3; ++d) {
    if (t.size(d) > 1 && (t.stride(d) <= 0 || t.stride(d) >= int64_t{1} << 38)) return false;
  }
  return in_packs(input(t), t.size(0), t.size(1), t.size(2), 2 * t.size(3), 2);
}

template <class T>
CUtensorMap map_of(const InputHeads& t, const AttentionArguments& g, int rows) {
  const auto size = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  // The stride of a dimension of one is not used, but has to be a multiple of 16.
  const auto stride = [](int64_t n, int64_t elements) { return static_cast<cuuint64_t>(n == 1 ? 16 : 2 * elements); };
  return map_of_rows(kMapType<T>, t.data, {size(g.width), size(g.positions), size(g.heads), size(g.batch)},
                     {stride(g.positions, t.row), stride(g.heads, t.head), stride(g.batch, t.batch)}, rows);
}

struct WgmmaAttention {
  const Tensor& q;

  void operator()(const AttentionArguments&, float*) const {
    STD_TORCH_CHECK(false, "attention by wgmma multiplies bfloat16 and float16");
  }

  template <class T>
  void operator()(const AttentionArguments& g, T*) const {
    with_width(g.width, [&](auto width) {
      using S = WideShape<decltype(width)::value>;
      const int64_t blocks = g.batch * g.heads * divide_up(g.positions, S::kQueries);
      launch(attention_wgmma_kernel<T, decltype(width)::value>, grid_of(blocks), kWideBlock, S::kSharedBytes,
             current_stream(q), map_of<T>(g.q, g, S::kQueries), map_of<T>(g.k, g, S::kKeys),
             map_of<T>(g.v, g, S::kKeys), g);
    });
  }
};

bool has_wgmma() {
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major == 9 && minor == 0;
}

// The kernel of every device computes what this one cannot take.
std::tuple<Tensor, Tensor> attention_wgmma(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  if (has_wgmma() && can_be_mapped(q) && can_be_mapped(k) && can_be_mapped(v)) {
    return checked_attention(q, k, v, scale, WgmmaAttention{q});
  }
  return attention_mma(q, k, v, scale);
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CUDA, m) {
  m.impl("attention_wgmma", TORCH_BOX(&fused_diffusion::attention_wgmma));
}
