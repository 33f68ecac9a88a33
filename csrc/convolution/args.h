// The arguments of fused_diffusion::convolution_: a convolution of images in channels_last, with the normalisation and
// activation before it and the residual sum after it. docs/packed-weights.md describes the packed weights.
#pragma once

#include <cstdint>

#include "common/floats.h"

namespace fused_diffusion {

// Packed weights: kernels/_limits.py has the same constants.
constexpr int64_t kPanel = 64;        // output channels that are computed together
constexpr int64_t kPackedLanes = 16;  // output channels are padded to a multiple
constexpr int kPairChunk = 32;        // channels of bfloat16 that AMX multiplies together
constexpr int kByteChunk = 64;        // channels of int8 that AMX multiplies together
constexpr int32_t kZero = 96;         // ImageScale::zero after SiLU, which is hardly below 0
constexpr float kLargestLimb = 127;   // largest magnitude of the top limb; the lower two add less than half a unit
// Products of int8 that a 32-bit sum can hold.
constexpr int64_t kMaxProducts = ((int64_t{1} << 31) - 1) / (128 * (3 * 128 + kZero));
constexpr int64_t kMaxRows = 48;  // pixels that a panel is multiplied by at a time, whose addresses are kept in a list

// The quantisation of an image for AMX's int8 products: x is about q * scale / 2^16 for the integer
// q = round(x * inverse), and three int8 limbs hold q - zero * 2^16.
struct ImageScale {
  float scale, inverse;
  int32_t zero;
};

// The function of the sums and bias of an output. In Python: ACTIVATIONS of kernels/ops/convolution/library.py.
enum class Activation : int64_t {
  none,
  silu,
  gelu,       // x * Phi(x)
  gelu_tanh,  // its approximation by tanh
  geglu,      // value * gelu(gate); two outputs of the product make one of the convolution
};
constexpr int64_t kActivations = 5;

// out = (activation(conv(act((x - centre) * gain + offset)) + bias) + residual) * factor. The distance between pixels is
// given for each of x, residual and out, so that each may be a range of the channels of a wider image.
struct Convolution {
  const void *x, *residual;  // residual may be null, and may be out itself
  void* out;
  const float *weight, *bias;                   // packed; bias: [out_channels], may be null
  const float *centre, *gain, *offset;          // [images, channels] each, or all null
  const float* bounds;                          // [images, channels] of the magnitudes of act(...), or null
  const float* channel_scales;                  // [channels, padded]: inputs are multiplied by them, for AMX's int8
  const ImageScale* scales;                     // [images], for AMX's int8
  int64_t images, channels, height, width;      // of x, before it is upsampled
  int64_t out_channels, out_height, out_width;  // out_channels: of the product, before `activation`
  int64_t results;                              // channels of out: fewer for Activation::geglu
  int64_t x_pixel, residual_pixel, out_pixel;   // distances, in elements
  int64_t kernel, stride, padding;              // padding: on the left and above
  int64_t scale;                                // 2: each pixel of x is read as 2 x 2
  int64_t panel;                                // output channels whose weights lie together: kPanel or kPackedLanes
  bool silu;
  Activation activation;
  float factor;  // of the sum

  FD_HD int64_t in_height() const { return height * scale; }
  FD_HD int64_t in_width() const { return width * scale; }
  FD_HD int64_t panels() const { return (out_channels + kPanel - 1) / kPanel; }
  FD_HD int64_t padded_out() const { return round_up(out_channels, kPackedLanes); }
  FD_HD int64_t panel_width(int64_t index) const {
    const int64_t remaining = padded_out() - index * kPanel;
    return remaining < kPanel ? remaining : kPanel;
  }
};

// A block of a Winograd convolution: whole strips of tiles, a strip being a row of tiles of one image.
//
// F(m x m, 3 x 3) computes a tile of m x m outputs from (m + 2) x (m + 2) inputs, with one product for each input,
// called frequency (Lavin & Gray 2016, arXiv:1509.09308; Winograd 1980). Inputs and outputs are
// [frequency][tile][channel].
struct WinogradBlock {
  int64_t size;                     // m, 2 or 4
  int64_t wide, high;               // tiles to a strip, strips to an image
  int64_t first, strips;            // first strip of this block, counted over all images, and how many
  int64_t inputs, outputs;          // floats of a tile at a frequency
  int64_t input_step, output_step;  // floats from one frequency to the next

  FD_HD WinogradBlock(const Convolution& g, int64_t size_, int64_t pack, int64_t strips_)
      : size(size_), first(0), strips(strips_) {
    wide = (g.out_width + size - 1) / size;
    high = (g.out_height + size - 1) / size;
    inputs = round_up(g.channels, 16) / pack;
    outputs = g.padded_out();
    // + 16: with a power of two as step, all frequencies of a tile would share one set of the cache.
    input_step = strips * wide * inputs + 16;
    output_step = strips * wide * outputs + 16;
  }

  FD_HD int64_t frequencies() const { return (size + 2) * (size + 2); }
  FD_HD int64_t count() const { return strips * wide; }

  // Rows of the inputs of an image's part of the block, at most.
  FD_HD int64_t plane_rows() const { return (strips < high ? strips : high) * size + 2; }
};

// A block of a direct convolution: a few whole images, or some rows of one; and the inputs that it needs, with their
// padding: [images][rows][columns][channels].
struct DirectBlock {
  int64_t image, images;     // first, count
  int64_t row, rows;         // first output row, count
  int64_t in_rows, columns;  // of the inputs
  int64_t pixel;             // bytes from one input pixel to the next
  int64_t image_step;        // bytes from one image to the next

  FD_HD int64_t count(const Convolution& g) const { return images * rows * g.out_width; }
};

// How many neighbouring pixels are packed into one row of AMX's left factor, which has room for `vectors` vectors of 16
// channels. With few channels it is more than one, and one product serves several taps of the filter.
FD_HD int64_t merged_pixels(const Convolution& g, int64_t vectors) {
  const int64_t fit = vectors / ((g.channels + 15) / 16);
  return g.kernel == 1 || fit < 2 ? 1 : fit < g.kernel ? fit : g.kernel;
}

// A block of a convolution by AMX, and the inputs that it needs: images one behind another, each row by row with its
// padding, one chunk of channels after another; or, in place, the pixels of x itself.
//
// Outputs are computed in runs, whose inputs are `stride` pixels apart. At stride 1 a run is a whole image: outputs
// that straddle two rows are computed and discarded.
struct AmxBlock {
  int64_t image, images;        // first, count
  int64_t row, rows;            // first output row, count
  int64_t in_rows, columns;     // of the inputs
  int64_t count;                // input pixels, and room for one AMX tile more
  int64_t pixel, piece, chunk;  // bytes from one pixel, piece of a number, or chunk of channels, to the next
  int64_t runs, length;         // count, and outputs of a run
  int64_t merged;               // pixels in a row of the left factor
  bool flat;                    // whether a run is a whole image
  bool in_place;                // whether x is multiplied without a copy
  bool panels_first;            // the order of the work items: all pixels of a panel, or all panels of some pixels

  // The first pixel of row `row` of inputs, counted over the block's images. One extra pixel follows each image.
  FD_HD int64_t input(int64_t row) const { return row * columns + row / in_rows; }

  // The input pixel of a run's first output and the filter's first tap.
  FD_HD int64_t start(const Convolution& g, int64_t run) const {
    return input(flat ? run * in_rows : run / rows * in_rows + run % rows * g.stride);
  }
};

}  // namespace fused_diffusion
