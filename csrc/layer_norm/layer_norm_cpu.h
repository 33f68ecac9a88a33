// layer_norm_ on one instruction set, for layer_norm/layer_norm.cpp.

#include "simd/exp.h"

constexpr int kAccumulators = 4;  // so that sums do not wait for one another

FD_HD float sum_of_lanes(Vec value) {
#if FD_LANES == 16
  return _mm512_reduce_add_ps((__m512)value);
#else
  float sum = value[0];
  for (int i = 1; i < kLanes; ++i) sum += value[i];
  return sum;
#endif
}

// Calls add(accumulator, vector of x, whether a lane exists: 1 or 0) for all channels of a row.
template <class T, class Add>
FD_HD void each_vector(const T* x, int64_t channels, const Add& add) {
  const Vec one = spread(1.0f);
  int64_t c = 0;
  for (; c + kAccumulators * kLanes <= channels; c += kAccumulators * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kAccumulators; ++i) add(i, load(x + c + i * kLanes), one);
  }
  for (; c + kLanes <= channels; c += kLanes) add(0, load(x + c), one);
  if (c < channels) {
    float present[kLanes];
    for (int i = 0; i < kLanes; ++i) present[i] = i < channels - c ? 1.0f : 0.0f;
    add(1, load(x + c, channels - c), load(present));
  }
}

// The norm is followed by y * gain + offset: weight and bias, then scale and shift of the image.
FD_HD void affine_of_image(const LayerNorm& args, int64_t image, float* gain, float* offset) {
  const float* scale = args.scale == nullptr ? nullptr : args.scale + image * args.scale_row;
  const float* shift = args.shift == nullptr ? nullptr : args.shift + image * args.shift_row;
  for (int64_t c = 0; c < args.channels; ++c) {
    const float factor = scale == nullptr ? 1.0f : 1.0f + scale[c];
    gain[c] = (args.weight == nullptr ? 1.0f : args.weight[c]) * factor;
    offset[c] = (args.bias == nullptr ? 0.0f : args.bias[c] * factor) + (shift == nullptr ? 0.0f : shift[c]);
  }
}

// Three passes over a row, which stays in the first cache: the mean; the moments about that float32 number, because its
// rounding matters where the mean is far larger than the deviations; the result.
template <class T>
void normalise_rows(const LayerNorm& args, int64_t begin, int64_t end) {
  const int64_t channels = args.channels;
  const float inverse = 1.0f / static_cast<float>(channels);
  ScratchArrays scratch(2 * channels);
  float *gains = scratch.take(channels), *offsets = scratch.take(channels);
  for (int64_t row = begin; row < end; ++row) {
    if (row == begin || row % args.positions == 0) affine_of_image(args, row / args.positions, gains, offsets);
    const T* x = static_cast<const T*>(args.x) + row * args.x_row;
    const T* residual =
        args.residual == nullptr ? nullptr : static_cast<const T*>(args.residual) + row * args.residual_row;
    T* out = static_cast<T*>(args.out) + row * args.out_row;
    Vec centre = {};
    if (!args.rms) {
      Vec sums[kAccumulators] = {};
      each_vector(x, channels, [&](int i, Vec value, Vec) FD_INLINE { sums[i] += value; });
      centre = spread(sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) * inverse);
    }
    Vec sums[kAccumulators] = {}, squares[kAccumulators] = {};
    each_vector(x, channels, [&](int i, Vec value, Vec present) FD_INLINE {
      const Vec d = (value - centre) * present;
      sums[i] += d;
      squares[i] = mul_add(d, d, squares[i]);
    });
    const double square = sum_of_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) * inverse;
    const double rest = args.rms ? 0 : sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) * inverse;
    const double variance = square - rest * rest;
    const double rstd = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + args.eps);  // NaN stays NaN
    const Vec factor = spread(static_cast<float>(rstd)), offset = spread(static_cast<float>(-rest * rstd));
    for (int64_t c = 0; c < channels; c += kLanes) {
      const int64_t lanes = channels - c < kLanes ? channels - c : kLanes;
      const bool whole = lanes == kLanes;
      const auto part = [&](auto* from) FD_INLINE { return whole ? load(from + c) : load(from + c, lanes); };
      Vec y = mul_add(mul_add(part(x) - centre, factor, offset), part(gains), part(offsets));
      if (args.silu) y = silu<T>(y * spread(-kLog2E));
      if (residual != nullptr) y += part(residual);
      if (whole) store(out + c, y);
      else store(out + c, y, lanes);
    }
  }
}
