// Shared by the CUDA kernels of attention: a warp's softmax of 16 queries, online over tiles of keys, and its output.
#pragma once

#include "attention/products.h"
#include "cuda/launch.h"

namespace fused_diffusion {

// The softmax of a warp's 16 queries. For each query: the largest product with a key; the sum of the weights relative
// to that maximum, of which each lane has a part; and the sum of the weighted values.
template <class P, int kWidth>
struct WarpSoftmax {
  float maximum[P::kLaneRows], sum[P::kLaneRows];
  Product<kWidth> values;
};

template <int kColumns>
__device__ __forceinline__ void negate(Product<kColumns>& products) {
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products.at[n][i] = -products.at[n][i];
  }
}

// Adds kColumns keys, of which the first `keys` exist, to the softmax, and makes weights of their products with the
// queries, of which a unit is a factor of 2^octaves of a weight. The weighted values remain to be added.
template <class P, int kWidth, int kColumns>
__device__ __forceinline__ void add_to_softmax(WarpSoftmax<P, kWidth>& softmax, Product<kColumns>& products,
                                               float octaves, int keys, int lane) {
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
}

// Writes four numbers from column d on to an output's row of `width` numbers, or as many as there are.
template <class T>
__device__ __forceinline__ void store_output(T* row, const float (&values)[4], float factor, int d, int width) {
  const float scaled[4] = {values[0] * factor, values[1] * factor, values[2] * factor, values[3] * factor};
  if constexpr (sizeof(T) == 4) {
    store4(row + d, scaled, width - d, width % 4 == 0);
  } else if (width % 4 == 0) {  // heads follow each other, from aligned memory on
    *reinterpret_cast<uint2*>(row + d) =
        make_uint2(round_pair(scaled[0], scaled[1], T{}), round_pair(scaled[2], scaled[3], T{}));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (d + i < width) from_float(scaled[i], row[d + i]);
    }
  }
}

}  // namespace fused_diffusion
