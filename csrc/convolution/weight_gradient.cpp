// fused_diffusion::convolution_weight_gradient on a CPU with AMX: the gradient of a convolution of bfloat16 maps with
// regard to its weight and bias, as products of tiles that sum over pixels.
//
// Pixels are numbered row by row with one of zeros after each row and a row of zeros after each image, so that a tap is
// a distance between numbers: d weight[k, tap, c] is the sum over pixels of grad[k, pixel] x[pixel + tap, c]. Both
// factors are first written in that order: the gradient by channels, and x by pairs of pixels, as right factors; once
// with pairs that begin at even pixels, for taps of even distance, and once with those that begin at odd ones.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "simd/dispatch.h"
#include "common/floats.h"
#include "common/channels_last.h"
#include "common/scratch.h"
#include "common/targets.h"

#if FD_AMX
#include <immintrin.h>
#endif

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 32;            // pixels that are multiplied together
constexpr int64_t kBlock = 32;            // channels of either factor that are
constexpr int64_t kChunksOfPiece = 8;     // of pixels, whose factors stay in the first cache from tap to tap
constexpr int64_t kPackedBytes = 1 << 20; // of as many pixels at a time; more if the weight is large
constexpr int64_t kMostGroups = 16;       // of images
constexpr int64_t kAddsPerThread = 1 << 15;
constexpr int64_t kMostTaps = 9;

struct Gradient {
  const uint16_t *grad, *x;  // [images][height][width] pixels, so far apart
  int64_t grad_pixel, x_pixel;
  int64_t images, height, width, outputs, inputs, side;  // side: of the kernel, 1 or 3
  float *weight, *bias;      // [outputs][side][side][inputs], [outputs]

  FD_HD int64_t border() const { return side / 2; }
  FD_HD int64_t row() const { return width + border(); }
  FD_HD int64_t numbered() const { return (height + border()) * row(); }  // of an image
  FD_HD int64_t taps() const { return side * side; }
  FD_HD int64_t margin() const { return side == 1 ? 0 : divide_up(row() + 1, kChunk); }  // chunks that taps reach
};

// What one thread does on its own, so that no factor goes from core to core: some of the images, as chunks of their
// pixels, `at_once` of which are packed, and of the outputs, as blocks.
struct Part {
  int64_t first_image, images, at_once, first_block, last_block;
  float *weight, *bias;  // as in Gradient

  FD_HD int64_t outputs() const { return (last_block - first_block) * kBlock; }
};

// Where the packed factors of some chunks lie.
struct Packed {
  int64_t first, chunks, margin;  // margin: as many chunks of x before and after those have been packed, too
  int64_t row_bytes;              // from a channel of the gradient to the next
  int64_t group_bytes;            // from 16 channels of x to the next
  char *rows, *even, *odd;        // odd: the i-th pair is of pixels 2 i - 1 and 2 i
};

#if FD_AMX
FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8")
namespace amx {
#define FD_LANES 16
#define FD_BFLOAT16 1
#include "simd/vec.h"
#include "amx/tile_gemm.h"

// The pixels of a chunk, and the one before: where each is in the images' tensors, in pixels, or -1 for zeros.
struct Pixels {
  int64_t at[kChunk + 1];

  FD_HD Pixels(const Gradient& g, const Part& part, int64_t chunk) {
    const int64_t first = chunk * kChunk - 1, number = std::max<int64_t>(0, first);
    int64_t image = number / g.numbered(), y = number % g.numbered() / g.row(), column = number % g.numbered() % g.row();
    for (int64_t i = 0; i <= kChunk; ++i) {
      if (first + i < 0) {
        at[i] = -1;
        continue;
      }
      const bool exists = image < part.images && y < g.height && column < g.width;
      at[i] = exists ? ((part.first_image + image) * g.height + y) * g.width + column : -1;
      if (++column == g.row()) {
        column = 0;
        if (++y == g.height + g.border()) y = 0, ++image;
      }
    }
  }
};

// 16 channels of two pixels, side by side.
FD_HD __m512i pair_of_pixels(const uint16_t* first, const uint16_t* second, __mmask16 mask) {
  const __m256i low = first == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(mask, first);
  const __m256i high = second == nullptr ? _mm256_setzero_si256() : _mm256_maskz_loadu_epi16(mask, second);
  return interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
}

// chunk: of the packed ones.
FD_HD void pack_input(const Gradient& g, const Packed& p, int64_t chunk, const Pixels& pixels) {
  for (int64_t group = 0; group < divide_up(g.inputs, kBlock) * 2; ++group) {
    const uint16_t* from = g.x + 16 * group;
    const int64_t to = group * p.group_bytes + (p.margin + chunk) * kTileBytes;
    const __mmask16 mask = first_lanes(g.inputs - 16 * group);
    const auto pixel = [&](int64_t i) FD_INLINE {
      return pixels.at[i] < 0 ? nullptr : from + pixels.at[i] * g.x_pixel;
    };
    for (int64_t i = 0; i < kChunk / 2; ++i) {
      _mm512_store_si512(p.even + to + i * kRowBytes, pair_of_pixels(pixel(2 * i + 1), pixel(2 * i + 2), mask));
    }
    for (int64_t i = 0; i < (g.side == 1 ? 0 : kChunk / 2); ++i) {
      _mm512_store_si512(p.odd + to + i * kRowBytes, pair_of_pixels(pixel(2 * i), pixel(2 * i + 1), mask));
    }
  }
}

// Also adds it up, for the bias.
FD_HD void pack_gradient(const Gradient& g, const Part& part, const Packed& p, int64_t chunk, const Pixels& pixels) {
  for (int64_t group = 0; group < part.outputs() / 16; ++group) {
    const int64_t k = part.first_block * kBlock + 16 * group;
    const uint16_t* from = g.grad + k;
    char* to = p.rows + 16 * group * p.row_bytes + chunk * kRowBytes;
    const __mmask16 mask = first_lanes(g.outputs - k);
    const auto pixel = [&](int64_t i) FD_INLINE {
      return pixels.at[i] < 0 ? nullptr : from + pixels.at[i] * g.grad_pixel;
    };
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000));
    __m512i words[16];
    Vec sum = {};
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      words[i] = pair_of_pixels(pixel(2 * i + 1), pixel(2 * i + 2), mask);
      sum += (Vec)_mm512_slli_epi32(words[i], 16);
      sum += (Vec)_mm512_and_si512(words[i], upper);
    }
    const __m512 before = _mm512_maskz_loadu_ps(mask, part.bias + k);
    _mm512_mask_storeu_ps(part.bias + k, mask, _mm512_add_ps(before, (__m512)sum));
    transpose(words);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * p.row_bytes, words[i]);
  }
}

// Adds the products of some chunks of pixels to 32 x 32 sums, or begins those.
FD_HD void add_products(const char* rows, int64_t row_bytes, const char* pairs, int64_t group_bytes, int64_t chunks,
                        bool begins, float* sums) {
  constexpr int64_t kStep = kBlock * sizeof(float);
  float* below = sums + 16 * kBlock;
  asm volatile("" ::: "memory");  // GCC's tile intrinsics do not say what memory they read
  if (begins) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, kStep);
    _tile_loadd(1, sums + 16, kStep);
    _tile_loadd(2, below, kStep);
    _tile_loadd(3, below + 16, kStep);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk, rows += kRowBytes, pairs += kTileBytes) {
    load_left<2>(rows, row_bytes);
    _tile_loadd(6, pairs, kRowBytes);
    _tile_loadd(7, pairs + group_bytes, kRowBytes);
    multiply_tiles<2, 2>();
  }
  _tile_stored(0, sums, kStep);
  _tile_stored(1, sums + 16, kStep);
  _tile_stored(2, below, kStep);
  _tile_stored(3, below + 16, kStep);
  asm volatile("" ::: "memory");
}

// Adds the products of what is packed to the part's weight, or begins that: 32 outputs by 32 inputs at a time.
FD_HD void multiply(const Gradient& g, const Part& part, const Packed& p) {
  alignas(64) static thread_local float sums[kMostTaps][kBlock][kBlock];
  const int64_t pieces = divide_up(p.chunks, kChunksOfPiece);
  int64_t distances[kMostTaps], order[kMostTaps];  // the even distances first
  for (int64_t tap = 0; tap < g.taps(); ++tap) {
    distances[tap] = (tap / g.side - g.border()) * g.row() + tap % g.side - g.border();
    order[tap] = tap;
  }
  std::stable_partition(order, order + g.taps(), [&](int64_t tap) { return distances[tap] % 2 == 0; });
  for (int64_t k = part.first_block * kBlock; k < part.last_block * kBlock; k += kBlock) {
    const char* rows = p.rows + (k - part.first_block * kBlock) * p.row_bytes;
    for (int64_t c = 0; c < g.inputs; c += kBlock) {
      const int64_t begin = c / 16 * p.group_bytes + p.margin * kTileBytes;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t first = p.chunks * piece / pieces, chunks = p.chunks * (piece + 1) / pieces - first;
        for (int64_t i = 0; i < g.taps(); ++i) {
          const int64_t distance = distances[order[i]];
          const char* pairs = distance % 2 == 0 ? p.even + distance / 2 * kRowBytes
                                                : p.odd + (distance + 1) / 2 * kRowBytes;
          add_products(rows + first * kRowBytes, p.row_bytes, pairs + begin + first * kTileBytes, p.group_bytes,
                       chunks, piece == 0, sums[order[i]][0]);
        }
      }
      for (int64_t i = 0; i < std::min(kBlock, g.outputs - k); ++i) {
        for (int64_t tap = 0; tap < g.taps(); ++tap) {
          float* to = part.weight + ((k + i) * g.taps() + tap) * g.inputs + c;
          for (int64_t half = 0; half < 2; ++half, to += 16) {
            const __mmask16 mask = first_lanes(g.inputs - c - 16 * half);
            const __m512 sum = _mm512_load_ps(sums[tap][i] + 16 * half);
            const __m512 before = p.first == 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, to);
            _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, sum));
          }
        }
      }
    }
  }
}

inline void differentiate(const Gradient& g, const Part& part) {
  load_shapes();
  const int64_t groups = divide_up(g.inputs, kBlock) * 2, all = divide_up(part.images * g.numbered(), kChunk);
  const int64_t last = std::min(part.last_block * kBlock, g.outputs);
  for (int64_t k = part.first_block * kBlock; k < last; ++k) part.bias[k] = 0.0f;
  Packed p{};
  p.margin = g.margin();
  for (p.first = 0; p.first < all; p.first += part.at_once) {
    p.chunks = std::min(part.at_once, all - p.first);
    // Both an odd number of cache lines, so that what is used together does not fall on the same ones.
    p.row_bytes = (p.chunks + (p.chunks + 1) % 2) * 64;
    p.group_bytes = (p.chunks + 2 * p.margin) * kTileBytes + 64;
    p.rows = reinterpret_cast<char*>(buffer(part.outputs() * p.row_bytes / 4, 0));
    p.even = reinterpret_cast<char*>(buffer(2 * groups * p.group_bytes / 4, 1));
    p.odd = p.even + groups * p.group_bytes;
    for (int64_t chunk = -p.margin; chunk < p.chunks + p.margin; ++chunk) {
      const Pixels pixels(g, part, p.first + chunk);
      pack_input(g, p, chunk, pixels);
      if (chunk >= 0 && chunk < p.chunks) pack_gradient(g, part, p, chunk, pixels);
    }
    multiply(g, part, p);
  }
  _tile_release();
}
}  // namespace amx
FD_END_TARGET

// Images are divided into groups, whose gradients are added up afterwards, where those are small beside the images; by
// the shape alone, so that the number of threads does not change the result. Outputs are divided by that number.
void run(const Gradient& g, const Tensor& like) {
  const int64_t weight = g.outputs * g.taps() * g.inputs, size = weight + g.outputs;
  const int64_t numbers = g.images * g.height * g.width * (g.outputs + g.inputs);
  int64_t groups = 1;
  while (groups < kMostGroups && 2 * groups <= g.images && 16 * groups * size <= numbers) groups *= 2;
  const int64_t chunk_bytes = 2 * kChunk * (g.outputs + (g.side == 1 ? 1 : 2) * g.inputs);
  const int64_t fitting = std::max(kPackedBytes, 4 * size) / chunk_bytes;
  const int64_t at_once = std::max(fitting, 4 * g.margin() + kChunksOfPiece);
  const int64_t blocks = divide_up(g.outputs, kBlock), threads = torch::stable::get_num_threads();
  const int64_t parts = std::min(blocks, divide_up(threads, groups));
  Tensor sums = torch::stable::new_empty(like, {groups == 1 ? 0 : groups * size}, ScalarType::Float);
  float* of_groups = groups == 1 ? nullptr : static_cast<float*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / parts, i = item % parts, first = g.images * group / groups;
      float* to = groups == 1 ? g.weight : of_groups + group * size;
      amx::differentiate(g, {first, g.images * (group + 1) / groups - first, at_once, blocks * i / parts,
                             blocks * (i + 1) / parts, to, groups == 1 ? g.bias : to + weight});
    }
  });
  if (groups == 1) return;
  torch::stable::parallel_for(0, size, kAddsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = of_groups[i];
      for (int64_t group = 1; group < groups; ++group) sum += of_groups[group * size + i];
      (i < weight ? g.weight[i] : g.bias[i - weight]) = sum;
    }
  });
}
#endif

std::tuple<Tensor, Tensor> convolution_weight_gradient(const Tensor& grad, const Tensor& x, int64_t side) {
  STD_TORCH_CHECK(simd_in_use() == Simd::amx, "this processor has no AMX");
  STD_TORCH_CHECK(side == 1 || side == 3, "the kernel must be 1 x 1 or 3 x 3");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::BFloat16 && x.scalar_type() == ScalarType::BFloat16,
                  "grad and x must be bfloat16");
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4 && grad.size(0) == x.size(0) && grad.size(2) == x.size(2) &&
                      grad.size(3) == x.size(3),
                  "grad must be [N, K, H, W], and x [N, C, H, W]");
  const int64_t outputs = grad.size(1), inputs = x.size(1);
  STD_TORCH_CHECK((grad.const_data_ptr() != nullptr || grad.numel() == 0) &&
                      (x.const_data_ptr() != nullptr || x.numel() == 0),
                  "grad and x must have memory");
  Tensor weight = torch::stable::new_empty(x, {outputs, side, side, inputs}, ScalarType::Float);
  Tensor bias = torch::stable::new_empty(x, {outputs}, ScalarType::Float);
  if (grad.numel() == 0 || x.numel() == 0) {
    torch::stable::zero_(weight);
    torch::stable::zero_(bias);
  } else {
#if FD_AMX
    run({static_cast<const uint16_t*>(grad.const_data_ptr()), static_cast<const uint16_t*>(x.const_data_ptr()),
         pixel_distance(grad, "grad"), pixel_distance(x, "x"), x.size(0), x.size(2), x.size(3), outputs, inputs, side,
         static_cast<float*>(weight.mutable_data_ptr()), static_cast<float*>(bias.mutable_data_ptr())},
        x);
#endif
  }
  return {weight, bias};
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("convolution_weight_gradient", TORCH_BOX(&fused_diffusion::convolution_weight_gradient));
}
