// Winograd's convolution for training on one instruction set, for convolution/winograd_training.cpp.

#include "simd/exp.h"
// gelu.h uses exp.h.
#include "simd/gelu.h"
#include "simd/gemm.h"

#include "convolution/pixels_cpu.h"
// winograd.h uses pixels_cpu.h.
#include "convolution/winograd.h"

// ---- Packing of a weight.

// Factors of G, for the points 0, kNear and -kNear, kFar and -kFar.
constexpr float kOfZero = 1 / (kNear2 * kFar2);
constexpr float kOfNear = 1 / (2 * kNear2 * (kNear2 - kFar2));
constexpr float kOfFar = 1 / (2 * kFar2 * (kFar2 - kNear2));

// G w: the three taps of a filter's row or column at six frequencies.
FD_HD void transform_taps(const Vec (&w)[3], Vec (&u)[kSize]) {
  const Vec near = mul_add(w[2], spread(kNear2), w[0]) * spread(kOfNear), near_middle = w[1] * spread(kNear * kOfNear);
  const Vec far = mul_add(w[2], spread(kFar2), w[0]) * spread(kOfFar), far_middle = w[1] * spread(kFar * kOfFar);
  u[0] = w[0] * spread(kOfZero);
  u[1] = near + near_middle;
  u[2] = near - near_middle;
  u[3] = far + far_middle;
  u[4] = far - far_middle;
  u[5] = w[2];
}

// Items: channels of the weight for each kPanel outputs. to: as docs/packed-weights.md describes, in panels of
// `panel_width` outputs.
void pack_rows(const TrainedWeight& w, int64_t panel_width, float* to, int64_t begin, int64_t end) {
  const int64_t padded = round_up(w.outputs, kPackedLanes);
  alignas(64) float row[kFrequencies][kPanel];  // written to `to` in whole cache lines
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item / w.channels * kPanel, channel = item % w.channels;
    const int64_t width = padded - panel < kPanel ? padded - panel : kPanel;
    for (int64_t column = 0; column < width; column += kLanes) {
      const float* from = w.data + (panel + column) * w.output_step + channel * w.channel_step;
      const int64_t lanes = w.outputs - panel - column;
      Vec halfway[kSize][3];
      for (int s = 0; s < 3; ++s) {
        Vec taps[3], u[kSize];
        for (int r = 0; r < 3; ++r) {
          float numbers[kLanes] = {};
          const float* tap = from + r * w.row_step + s * w.column_step;
          if (lanes >= kLanes) {
            for (int i = 0; i < kLanes; ++i) numbers[i] = tap[i * w.output_step];
          } else {
            for (int i = 0; i < lanes; ++i) numbers[i] = tap[i * w.output_step];
          }
          taps[r] = load(numbers);
        }
        transform_taps(taps, u);
        for (int i = 0; i < kSize; ++i) halfway[i][s] = u[i];
      }
      for (int i = 0; i < kSize; ++i) {
        Vec u[kSize];
        transform_taps(halfway[i], u);
        for (int j = 0; j < kSize; ++j) store(row[i * kSize + j] + column, u[j]);
      }
    }
    const int64_t piece = width < panel_width ? width : panel_width;
    for (int64_t i = 0; i < kFrequencies; ++i) {
      float* next = to + (i * padded + panel) * w.channels + channel * piece;
      for (int64_t j = 0; j < width; j += piece, next += piece * w.channels) {
        memcpy(next, row[i] + j, piece * sizeof(float));
      }
    }
  }
}

// ---- The gradient of a weight.

// A y: four gradients of a tile's row or column at six frequencies.
FD_HD void transform_gradients(const Vec (&y)[kTile], Vec (&z)[kSize]) {
  const Vec even = mul_add(spread(kNear2), y[2], y[0]), odd = mul_add(spread(kNear2), y[3], y[1]) * spread(kNear);
  const Vec even2 = mul_add(spread(kFar2), y[2], y[0]), odd2 = mul_add(spread(kFar2), y[3], y[1]) * spread(kFar);
  z[0] = y[0];
  z[1] = even + odd;
  z[2] = even - odd;
  z[3] = even2 + odd2;
  z[4] = even2 - odd2;
  z[5] = y[3];
}

// Transforms one tile of gradients: [frequency] at `to`, `step` elements apart.
FD_HD void transform_gradient_tile(const float* plane, int64_t columns, float* to, int64_t step) {
  transform_square<kTile, kSize>(plane, columns, to, step, [](const Vec(&y)[kTile], Vec(&z)[kSize])
                                                               FD_INLINE { transform_gradients(y, z); });
}

// The sum of `rows` rows of `columns` vectors.
FD_HD Vec sum_plane(const float* plane, int64_t rows, int64_t columns) {
  Vec sum = {};
  for (int64_t row = 0; row < rows; ++row) {
    Vec of_row = {};
    for (int64_t column = 0; column < columns; ++column, plane += kLanes) of_row += load(plane);
    sum += of_row;
  }
  return sum;
}

// Items: vectors of channels of the images that the block has a part of. plane: scratch. pixel_sums: of a gradient of
// the output, which is transformed by A, the sums of the block's pixels, [image][channel]; null for an input, which is
// transformed by B^T.
void transform_factor(const Convolution& g, const WinogradBlock& block, const TransformedFactor& factor,
                      float* pixel_sums, float* plane, int64_t begin, int64_t end) {
  const int64_t columns = block.wide * kTile + 2, vectors = factor.channels / kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t channel = item % vectors * kLanes, group = channel / kTogether, width = factor.width(group);
    const int64_t image = block.first / block.high + item / vectors;
    const ImageStrips strips(block, image);
    fill_plane<Transform::plain, float>(g, image, channel, strips.from * kTile - 1, strips.count * kTile + 2, columns,
                                        plane);
    if (pixel_sums != nullptr) {
      const Vec sum = sum_plane(plane + columns * kLanes, strips.count * kTile, columns);
      store(pixel_sums + item / vectors * factor.channels + channel, sum);
    }
    float* to = factor.group(0, group) + strips.tile * width + channel % kTogether;
    for (int64_t strip = 0; strip < strips.count; ++strip) {
      for (int64_t i = 0; i < block.wide; ++i, to += width) {
        const float* corner = plane + (strip * columns + i) * kTile * kLanes;
        if (pixel_sums != nullptr) transform_gradient_tile(corner + (columns + 1) * kLanes, columns, to, factor.step());
        else transform_tile<kTile>(corner, columns, to, factor.step());
      }
    }
  }
}

// Items: groups of outputs of all frequencies. Adds the products of the block's tiles to the sums, or begins them.
void multiply_factors(const TransformedFactor& grad, const TransformedFactor& x, const WeightSums& sums, bool begins,
                      int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const int64_t frequency = item / grad.groups(), outputs = item % grad.groups();
    const int64_t width = grad.width(outputs), first = outputs * kTogether;
    const int64_t rows = sums.outputs - first < width ? sums.outputs - first : width;
    const StridedRows lhs{reinterpret_cast<const char*>(grad.group(frequency, outputs)), 4, 4 * width, grad.tiles};
    for (int64_t channels = 0; channels < x.groups(); ++channels) {
      float* to = sums.data + frequency * sums.step() + first * sums.padded_channels + channels * kTogether;
      multiply_panel<Float32>(lhs, 0, rows, x.group(frequency, channels), x.width(channels), x.width(channels),
                              [&](int64_t row, int64_t column, Vec sum) FD_INLINE {
                                float* at = to + row * sums.padded_channels + column;
                                store(at, begins ? sum : load(at) + sum);
                              });
    }
  }
}

// G^T m: from six frequencies to three taps.
FD_HD void recover_gradients(const Vec (&m)[kSize], Vec (&w)[3]) {
  const Vec near = (m[1] + m[2]) * spread(kOfNear), far = (m[3] + m[4]) * spread(kOfFar);
  w[0] = mul_add(spread(kOfZero), m[0], near + far);
  w[1] = mul_add(spread(kFar * kOfFar), m[3] - m[4], (m[1] - m[2]) * spread(kNear * kOfNear));
  w[2] = mul_add(spread(kFar2), far, mul_add(spread(kNear2), near, m[5]));
}

// Items: outputs. to: [output][3][3][channel].
void transform_sums(const WeightSums& sums, float* to, int64_t begin, int64_t end) {
  for (int64_t output = begin; output < end; ++output) {
    for (int64_t channel = 0; channel < sums.channels; channel += kLanes) {
      const float* from = sums.data + output * sums.padded_channels + channel;
      const int64_t lanes = sums.channels - channel < kLanes ? sums.channels - channel : kLanes;
      Vec halfway[3][kSize];
      for (int j = 0; j < kSize; ++j) {
        Vec m[kSize], w[3];
        for (int i = 0; i < kSize; ++i) m[i] = load(from + (i * kSize + j) * sums.step());
        recover_gradients(m, w);
        for (int r = 0; r < 3; ++r) halfway[r][j] = w[r];
      }
      for (int r = 0; r < 3; ++r) {
        Vec w[3];
        recover_gradients(halfway[r], w);
        for (int s = 0; s < 3; ++s) {
          float* tap = to + ((output * 3 + r) * 3 + s) * sums.channels + channel;
          if (lanes == kLanes) store(tap, w[s]);
          else store(tap, w[s], lanes);
        }
      }
    }
  }
}
