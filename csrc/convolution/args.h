// A convolution of images in channels_last, with what comes before and after it in a UNet, by its arguments.
#pragma once

#include <cstdint>

#include "common/floats.h"

namespace fused_diffusion {

// How packed weights look; kernels/_limits.py says the same, and docs/packed-weights.md shows it.
constexpr int64_t kPanel = 64;        // columns of the right factor that lie together
constexpr int64_t kPackedLanes = 16;  // output channels are padded to a multiple
constexpr int kPairChunk = 32;        // channels of bfloat16 that AMX multiplies together
constexpr int kByteChunk = 64;        // channels in bytes that are
constexpr int32_t kZero = 96;         // AMX's first digit of 0 in a map that is mostly above it
constexpr float kLargestDigit = 127;  // AMX's first digit; the digits after it add up to nearly half of its unit
// Products of bytes to a sum of 32 bits.
constexpr int64_t kMaxProducts = ((int64_t{1} << 31) - 1) / (128 * (3 * 128 + kZero));
constexpr int64_t kMostRows = 48;  // of the left factor at a time: their addresses are kept in a list

FD_HD int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// How AMX's digits make the numbers of an image: whole ones, which `inverse` takes them to, less `zero` units of the first
// digit.
struct ImageScale {
  float scale, inverse;
  int32_t zero;
};

// out = conv(act((x - centre) * gain + offset)) + bias + residual. Pixels lie at a distance of their own in x,
// residual and out, so that each may be a range of the channels of a wider image.
struct Convolution {
  const void *x, *residual;  // residual may be null, and may be out itself
  void* out;
  const float *weight, *bias;                 // packed; bias: [out_channels], may be null
  const float *centre, *gain, *offset;        // [images, channels] each, or all null
  const float* bounds;                        // [images, channels], of the inputs' magnitudes, or null
  const float* shares;                        // [channels, padded], for AMX in digits: inputs are multiplied by them
  const ImageScale* scales;                   // [images], likewise
  int64_t images, channels, height, width;    // of x, before it is upsampled
  int64_t out_channels, out_height, out_width;
  int64_t x_pixel, residual_pixel, out_pixel;  // distances, in elements
  int64_t kernel, stride, padding;             // padding: on the left and above
  int64_t scale;                               // 2: each pixel of x is read as 2 x 2
  bool silu;

  FD_HD int64_t in_height() const { return height * scale; }
  FD_HD int64_t in_width() const { return width * scale; }
  FD_HD int64_t panels() const { return (out_channels + kPanel - 1) / kPanel; }
  FD_HD int64_t padded_out() const { return round_up(out_channels, kPackedLanes); }
  FD_HD int64_t panel_width(int64_t panel) const {
    const int64_t left = padded_out() - panel * kPanel;
    return left < kPanel ? left : kPanel;
  }
};

// Some of the tiles of a Winograd convolution: whole strips, a strip being a row of tiles of one image.
//
// F(m x m, 3 x 3) gets m x m outputs from (m + 2) x (m + 2) inputs by as many products as inputs, its frequencies
// (Lavin & Gray 2016, arXiv:1509.09308; Winograd 1980). Both factors are [frequency][row][channel].
struct Tiles {
  int64_t size;                     // m
  int64_t wide, high;               // tiles to a strip, strips to an image
  int64_t first, strips;            // of this block, counted over all images
  int64_t inputs, outputs;          // words to a tile and frequency
  int64_t input_step, output_step;  // words from one frequency to the next

  FD_HD Tiles(const Convolution& g, int64_t size_, int64_t pack, int64_t strips_) : size(size_), first(0), strips(strips_) {
    wide = (g.out_width + size - 1) / size;
    high = (g.out_height + size - 1) / size;
    inputs = round_up(g.channels, 16) / pack;
    outputs = g.padded_out();
    // Not a power of two apart, or all frequencies of a tile would meet in one set of the cache.
    input_step = strips * wide * inputs + 16;
    output_step = strips * wide * outputs + 16;
  }

  FD_HD int64_t frequencies() const { return (size + 2) * (size + 2); }
  FD_HD int64_t count() const { return strips * wide; }
};

// Some of the outputs of a direct convolution, and the inputs that they need, with their padding around them:
// [images][rows][columns][words]. A block is a few whole images, or some rows of one.
struct Rows {
  int64_t image, images;      // first, count
  int64_t row, rows;          // of the outputs
  int64_t in_rows, columns;   // of the inputs
  int64_t pixel;              // bytes from one input pixel to the next
  int64_t image_step;         // bytes from one image to the next

  FD_HD int64_t count(const Convolution& g) const { return images * rows * g.out_width; }
};

// How many pixels beside each other share a row of AMX's left factor, which holds so many vectors of channels.
FD_HD int64_t merged_pixels(const Convolution& g, int64_t vectors) {
  const int64_t fit = vectors / ((g.channels + 15) / 16);
  return g.kernel == 1 || fit < 2 ? 1 : fit < g.kernel ? fit : g.kernel;
}

// Some of the outputs of a convolution by AMX, and the inputs that they need: images one behind another, each row by
// row with its padding, some channels at a time. With few channels, the next pixels stand beside each, so that one
// product serves as many taps of the filter. Outputs come in lines, whose inputs are `stride` pixels apart. With a
// stride of 1 a line is a whole image, and what it has between two rows is not used.
struct Pixels {
  int64_t image, images;     // first, count
  int64_t row, rows;         // of the outputs
  int64_t in_rows, columns;  // of the inputs
  int64_t count;             // of the inputs, and room for a tile more
  int64_t lines, length;
  int64_t merged;            // pixels to a row of the left factor
  bool flat, panels_first;

  // The first pixel of a row of inputs, counted over the block's images, behind each of which there is a pixel more.
  FD_HD int64_t input(int64_t row) const { return row * columns + row / in_rows; }

  // The input pixel of a line's first output and a filter's first tap.
  FD_HD int64_t start(const Convolution& g, int64_t line) const {
    return input(flat ? line * in_rows : line / rows * in_rows + line % rows * g.stride);
  }
};

}  // namespace fused_diffusion
