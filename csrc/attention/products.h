// How a warp multiplies tiles in shared memory, in two ways with one interface: TensorCores for the 16-bit types, and
// MultiplyAdds, fused multiply-adds, for float32.
//
// A warp holds 16 rows of a product in its registers; a lane holds parts of the same few rows in every product. For
// number [n][i] of a lane, `lane_row` is the index among the lane's rows, `row` the row in the product, and `column`
// its column; in a sum of weighted rows, as `accumulate` computes it, the column is `sum_column`.
#pragma once

#include <type_traits>

#include "attention/args.h"
#include "attention/tiles.h"
#include "cuda/tensor_core.h"

namespace fused_diffusion {

constexpr int kWarpRows = 16;

// Elements from one row of a tile to the next: 16 bytes more than a row, which spreads eight rows over all banks of
// shared memory.
template <class T, int kWidth>
constexpr int kPitch = kWidth + 16 / static_cast<int>(sizeof(T));

// 16 rows and kColumns columns, in the registers of a warp.
template <int kColumns>
struct Product {
  float at[kColumns / 8][4];
};

template <class T>
struct TensorCores {
  static constexpr int kLaneRows = 2, kRowLanes = 4;  // rows of a lane; neighbouring lanes that share a row

  static __device__ __forceinline__ int lane_row(int i) { return i / 2; }
  static __device__ __forceinline__ int row(int lane, int r) { return product_place(lane, 2 * r).row; }
  static __device__ __forceinline__ int column(int lane, int n, int i) { return 8 * n + product_place(lane, i).column; }
  static __device__ __forceinline__ int sum_column(int lane, int n, int i) { return column(lane, n, i); }

  static __device__ __forceinline__ float exp2(float x) { return approximate_exp2(x); }
  static __device__ __forceinline__ float exp(float x) { return approximate_exp2(x * kLog2E); }

  // product += left right^T: 16 rows of `left`, kColumns of `right`.
  template <int kWidth, int kColumns>
  static __device__ __forceinline__ void multiply(Product<kColumns>& product, const T* left, const T* right, int lane) {
    left += left_row(lane).row * kPitch<T, kWidth> + left_row(lane).column;
    right += right_row(lane).row * kPitch<T, kWidth> + right_row(lane).column;
#pragma unroll
    for (int d = 0; d < kWidth; d += 16) {
      uint32_t a[4];
      load_matrices(a, left + d);
#pragma unroll
      for (int n = 0; n < kColumns / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, right + 16 * n * kPitch<T, kWidth> + d);
        multiply_add(product.at[2 * n], a, b[0], b[1], T{});
        multiply_add(product.at[2 * n + 1], a, b[2], b[3], T{});
      }
    }
  }

  // sum += weights rows, the weights rounded to T: kColumns of `rows`.
  template <int kWidth, int kColumns>
  static __device__ __forceinline__ void accumulate(Product<kWidth>& sum, const Product<kColumns>& weights,
                                                    const T* rows, int lane) {
    rows += right_row_transposed(lane).row * kPitch<T, kWidth> + right_row_transposed(lane).column;
#pragma unroll
    for (int k = 0; k < kColumns / 16; ++k) {
      // In registers, two neighbouring products are already laid out as a left factor.
      const float (&first)[4] = weights.at[2 * k], (&second)[4] = weights.at[2 * k + 1];
      const uint32_t a[4] = {round_pair(first[0], first[1], T{}), round_pair(first[2], first[3], T{}),
                             round_pair(second[0], second[1], T{}), round_pair(second[2], second[3], T{})};
#pragma unroll
      for (int n = 0; n < kWidth / 16; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, rows + 16 * k * kPitch<T, kWidth> + 16 * n);
        multiply_add(sum.at[2 * n], a, b[0], b[1], T{});
        multiply_add(sum.at[2 * n + 1], a, b[2], b[3], T{});
      }
    }
  }
};

struct MultiplyAdds {
  static constexpr int kLaneRows = 4, kRowLanes = 8;

  static __device__ __forceinline__ int lane_row(int i) { return i; }
  static __device__ __forceinline__ int row(int lane, int r) { return lane / 8 + 4 * r; }
  static __device__ __forceinline__ int column(int lane, int n, int) { return lane % 8 + 8 * n; }
  static __device__ __forceinline__ int sum_column(int lane, int n, int) { return lane % 8 * 4 + n / 4 * 32 + n % 4; }

  static __device__ __forceinline__ float exp2(float x) { return exp2f(x); }
  static __device__ __forceinline__ float exp(float x) { return expf(x); }

  template <int kWidth, int kColumns>
  static __device__ __forceinline__ void multiply(Product<kColumns>& product, const float* left, const float* right,
                                                  int lane) {
    left += row(lane, 0) * kPitch<float, kWidth>;
    right += column(lane, 0, 0) * kPitch<float, kWidth>;
#pragma unroll 2
    for (int d = 0; d < kWidth; d += 4) {
      float4 a[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] = *reinterpret_cast<const float4*>(left + 4 * r * kPitch<float, kWidth> + d);
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
        const float4 b = *reinterpret_cast<const float4*>(right + 8 * n * kPitch<float, kWidth> + d);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float& c = product.at[n][r];
          c = HardwareFma::fma(a[r].x, b.x, c);
          c = HardwareFma::fma(a[r].y, b.y, c);
          c = HardwareFma::fma(a[r].z, b.z, c);
          c = HardwareFma::fma(a[r].w, b.w, c);
        }
      }
    }
  }

  template <int kWidth, int kColumns>
  static __device__ __forceinline__ void accumulate(Product<kWidth>& sum, const Product<kColumns>& weights,
                                                    const float* rows, int lane) {
    rows += sum_column(lane, 0, 0);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll 2
      for (int i = 0; i < 8; ++i, rows += kPitch<float, kWidth>) {
        float weight[4];  // of column 8 n + i, which another lane holds
#pragma unroll
        for (int r = 0; r < 4; ++r) weight[r] = __shfl_sync(~0u, weights.at[n][r], lane / 8 * 8 + i);
#pragma unroll
        for (int m = 0; m < kWidth / 32; ++m) {
          const float4 b = *reinterpret_cast<const float4*>(rows + 32 * m);
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            sum.at[4 * m][r] = HardwareFma::fma(weight[r], b.x, sum.at[4 * m][r]);
            sum.at[4 * m + 1][r] = HardwareFma::fma(weight[r], b.y, sum.at[4 * m + 1][r]);
            sum.at[4 * m + 2][r] = HardwareFma::fma(weight[r], b.z, sum.at[4 * m + 2][r]);
            sum.at[4 * m + 3][r] = HardwareFma::fma(weight[r], b.w, sum.at[4 * m + 3][r]);
          }
        }
      }
    }
  }
};

template <class T>
using Products = std::conditional_t<std::is_same_v<T, float>, MultiplyAdds, TensorCores<T>>;

// The sum, and the maximum, over the lanes that share a row; each of these lanes gets it.
template <class P>
__device__ __forceinline__ float row_sum(float value) {
#pragma unroll
  for (int offset = 1; offset < P::kRowLanes; offset *= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

template <class P>
__device__ __forceinline__ float row_maximum(float value) {
#pragma unroll
  for (int offset = 1; offset < P::kRowLanes; offset *= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// Four lanes that share a row have 8 columns each of four blocks, two numbers of each. Lane t of them receives all of
// block t.
__device__ __forceinline__ void transpose(uint32_t (&pairs)[4], int lane) {
  const bool odd = lane % 2 != 0, high = lane / 2 % 2 != 0;
#pragma unroll
  for (int m = 0; m < 4; m += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? pairs[m] : pairs[m + 1], 1);
    pairs[m] = odd ? other : pairs[m];
    pairs[m + 1] = odd ? pairs[m + 1] : other;
  }
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    const uint32_t other = __shfl_xor_sync(~0u, high ? pairs[m] : pairs[m + 2], 2);
    pairs[m] = high ? other : pairs[m];
    pairs[m + 2] = high ? pairs[m + 2] : other;
  }
}

}  // namespace fused_diffusion
