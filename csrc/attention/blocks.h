// Shared by the CUDA kernels of attention and of its gradient: blocks of four warps, the copies of tiles to shared
// memory, and what their launches need.
#pragma once

#include "attention/args.h"
#include "attention/products.h"
#include "cuda/launch.h"

namespace fused_diffusion {

constexpr int kWarps = 4, kBlock = 32 * kWarps;

// Blocks for which a multiprocessor's registers must suffice. With more, the compiler would spill registers.
template <int kWidth>
constexpr int kBlocks = kWidth == 256 ? 2 : 3;

// The rows of one head.
template <class T>
struct HeadRows {
  const T* data;
  int64_t stride;

  __device__ HeadRows(const InputHeads& tensor, int64_t b, int64_t h)
      : data(tensor.at<const T>(b, h)), stride(tensor.row) {}
};

// Begins to copy rows [first, first + kCount) to a tile, with zeros beyond the last position and beyond the width.
// vector: whether 16 bytes of a row at a time are aligned and do not straddle its end.
template <int kCount, int kWidth, class T>
__device__ __forceinline__ void copy_tile(T* to, const HeadRows<T>& rows, int64_t first, int64_t positions, int width,
                                          bool vector) {
  constexpr int kPack = 16 / sizeof(T), kPacks = kWidth / kPack;
  const int column = static_cast<int>(threadIdx.x) % kPacks * kPack;
  const int first_row = static_cast<int>(threadIdx.x) / kPacks;
  if (vector) {
#pragma unroll 4
    for (int r = first_row; r < kCount; r += kBlock / kPacks) {
      const bool inside = first + r < positions && column < width;
      const T* from = inside ? rows.data + (first + r) * rows.stride + column : rows.data;
      copy_16_bytes(to + r * kPitch<T, kWidth> + column, from, inside);
    }
  } else {
#pragma unroll 2
    for (int r = first_row; r < kCount; r += kBlock / kPacks) {
      T* at = to + r * kPitch<T, kWidth> + column;
      const T* from = rows.data + (first + r) * rows.stride + column;
      for (int i = 0; i < kPack; ++i) at[i] = first + r < positions && column + i < width ? from[i] : T{};
    }
  }
}

// A ring of kStages buffers, through which the tiles of two tensors go in turn: tile 0 of the first, tile 0 of the
// second, tile 1 of the first, ... While the block works on one tile, the next are being copied.
template <class T, int kWidth, int kTile, int kStages>
class Ring {
 public:
  // The tiles of positions [begin, end). Copies that began before this are complete when the first tile is.
  __device__ Ring(T* buffers, const HeadRows<T>& first, const HeadRows<T>& second, int64_t begin, int64_t end,
                  int width, bool vector)
      : buffers_(buffers), first_(first), second_(second), begin_(begin), end_(end), width_(width), vector_(vector) {
#pragma unroll
    for (int turn = 0; turn < kStages - 1; ++turn) start(turn);
  }

  // Waits for the tile of this turn, and gives the buffer of the turn before to a new copy.
  __device__ const T* wait(int turn) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // until all threads' copies are complete, and no thread reads the tile before
    start(turn + kStages - 1);
    return buffer(turn);
  }

 private:
  static_assert(kStages % 2 == 0, "each buffer serves one of the two tensors");

  __device__ T* buffer(int turn) { return buffers_ + turn % kStages * kTile * kPitch<T, kWidth>; }

  __device__ void start(int turn) {
    const int64_t position = begin_ + int64_t{turn / 2} * kTile;
    if (position < end_) {
      copy_tile<kTile, kWidth>(buffer(turn), turn % 2 == 0 ? first_ : second_, position, end_, width_, vector_);
    }
    commit_copies();  // also without a copy, because wait_for_copies counts groups
  }

  T* buffers_;
  const HeadRows<T> first_, second_;
  const int64_t begin_, end_;
  const int width_;
  const bool vector_;
};

// The head and the first row of a block, in a grid of heads x tiles of `rows` rows. Divisions have 32 bits, which takes
// a fraction of the time of 64; the number of blocks has 31.
struct BlockPlace {
  int64_t head, b, h, first;

  __device__ BlockPlace(int64_t heads, int64_t positions, int rows) {
    const auto tiles = static_cast<unsigned>((positions + rows - 1) / rows);
    const unsigned which = blockIdx.x / tiles;
    head = which;
    b = which / static_cast<unsigned>(heads);
    h = which % static_cast<unsigned>(heads);
    first = int64_t{blockIdx.x % tiles} * rows;
  }
};

// The warps' sums in shared memory are float [kWarps][16][kSumPitch]; the pitch spreads eight rows over all banks.
template <int kWidth>
constexpr int kSumPitch = kWidth + 8;

template <class P, int kWidth>
__device__ __forceinline__ void store_sum(float* sums, const Product<kWidth>& sum, int warp, int lane) {
#pragma unroll
  for (int n = 0; n < kWidth / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = P::row(lane, P::lane_row(i));
      sums[(kWarpRows * warp + row) * kSumPitch<kWidth> + P::sum_column(lane, n, i)] = sum.at[n][i];
    }
  }
}

inline dim3 grid_of(int64_t blocks, unsigned kinds = 1) {
  STD_TORCH_CHECK(blocks <= 0x7FFFFFFF, "attention needs ", blocks, " blocks, more than a grid has");
  return dim3(static_cast<unsigned>(blocks), kinds);
}

// Whether every row of every head can be read 16 bytes at a time.
inline bool in_packs(const InputHeads& t, int64_t batch, int64_t heads, int64_t positions, int64_t row_bytes,
                     int64_t element_bytes) {
  const auto aligned = [&](int64_t size, int64_t stride) { return size == 1 || stride * element_bytes % 16 == 0; };
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && row_bytes % 16 == 0 && aligned(batch, t.batch) &&
         aligned(heads, t.head) && aligned(positions, t.row);
}

// Calls run(std::integral_constant<int, w>) for the smallest width w that is compiled and not below `width`.
template <class Run>
void with_width(int64_t width, const Run& run) {
  STD_TORCH_CHECK(width <= kMaxCudaWidth, "the width of a head is ", width, ", more than ", kMaxCudaWidth);
  if (width <= 64) {
    run(std::integral_constant<int, 64>{});
  } else if (width <= 128) {
    run(std::integral_constant<int, 128>{});
  } else {
    run(std::integral_constant<int, 256>{});
  }
}

}  // namespace fused_diffusion
