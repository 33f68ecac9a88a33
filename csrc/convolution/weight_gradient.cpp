// fused_diffusion::convolution_weight_gradient on a CPU with AMX: the gradient of a convolution of bfloat16 images with
// respect to its weight and bias,
//
//   d weight[k, r, s, c] = sum over n, i, j of grad[n, k, i, j] x[n, c, stride i + r - padding, stride j + s - padding]
//
// Tiles sum over 32 pairs (j, n) of one row i. Both factors are first packed row by row, each row column by column, and
// each column image by image. A tap (r, s) of the kernel then moves x by whole rows and columns. Rows outside of the
// image are left out of the sum, and so are columns where each holds 32 images; with fewer images, columns of zeros
// stand for them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <tuple>

#include "common/parallel.h"
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

constexpr int64_t kChunk = 32;           // terms of the sum in one product of tiles
constexpr int64_t kBlock = 32;           // channels of grad, and of x, whose products are summed together
constexpr int64_t kMostImages = kChunk;  // in a column

// Chunks that are summed for one tap before the next: both factors of a piece and the sums of three taps fit the
// first-level cache of 48 KiB.
constexpr int64_t kChunksOfPiece = 8;

constexpr int64_t kPackedBytes = 1 << 20;  // of both factors together, in half of the second-level cache
constexpr int64_t kMostGroups = 16;        // of rows
constexpr int64_t kLeastRowsOfGroup = 4;
constexpr int64_t kAddsPerThread = 1 << 15;
constexpr int64_t kMostSide = 3;

struct Gradient {
  const uint16_t *grad, *x;     // channels_last
  int64_t grad_pixel, x_pixel;  // elements from one pixel to the next
  int64_t images, height, width;  // of x
  int64_t out_height, out_width;  // of grad
  int64_t outputs, inputs, side, stride, padding;
  float *weight, *bias;  // [outputs][side][side][inputs], [outputs]

  FD_HD int64_t taps() const { return side * side; }

  // A bunch is up to `kMostImages` images. The rows of grad are numbered through all bunches.
  FD_HD int64_t bunches() const { return divide_up(images, kMostImages); }
  FD_HD int64_t rows() const { return bunches() * out_height; }
};

// The share of one thread, which packs its own factors so that none goes from core to core: a range of the rows, and
// of the blocks of outputs.
struct Part {
  int64_t first_row, last_row, first_block, last_block;
  float *weight, *bias;  // as in Gradient

  FD_HD int64_t outputs() const { return (last_block - first_block) * kBlock; }
};

// Positions from `first` on and before `last`, along one axis. The first constructor finds the outputs for which a tap
// meets an input inside of the image.
struct Range {
  int64_t first, last;

  FD_HD Range(int64_t tap, int64_t stride, int64_t padding, int64_t inputs, int64_t outputs) {
    first = padding > tap ? divide_up(padding - tap, stride) : 0;
    last = inputs + padding > tap ? std::min(outputs, divide_up(inputs + padding - tap, stride)) : 0;
    last = std::max(first, last);
  }

  FD_HD Range(int64_t first_, int64_t last_) : first(first_), last(std::max(first_, last_)) {}

  FD_HD Range within(int64_t from, int64_t to) const { return {std::max(first, from), std::min(last, to)}; }

  FD_HD int64_t size() const { return last - first; }
};

// How the rows of a bunch are packed, 16 channels at a time. Of grad, a row is [chunk][channel][32 terms]. Of x, a row
// is [column][pair of images][channel][2], with the columns of the padding; with a stride of 2, the even columns come
// before the odd ones, so that a tap meets columns side by side.
struct Layout {
  int64_t first_image, images;
  int64_t unit;     // terms of a column: the number of images, rounded up to an even one
  int64_t chunks;   // of a row of grad; zeros fill the last
  int64_t columns;  // of x, for each remainder modulo the stride
  int64_t x_row;    // bytes of 16 channels of a row of x
  bool whole;       // whether a column is a chunk, so that columns of the padding are left out

  FD_HD Layout(const Gradient& g, int64_t bunch) {
    first_image = bunch * kMostImages;
    images = std::min(kMostImages, g.images - first_image);
    unit = images + images % 2;
    whole = unit == kChunk;
    chunks = divide_up(g.out_width * unit, kChunk);
    columns = g.out_width + (g.side - 1) / g.stride;
    x_row = (phases(g) * columns * unit + (whole ? 0 : kChunk)) / 2 * 64;  // the last chunk may reach past the columns
  }

  FD_HD int64_t phases(const Gradient& g) const { return std::min(g.stride, g.side); }

  // Bytes from the begin of a row of x to the column that a tap meets for the first output.
  FD_HD int64_t start(const Gradient& g, int64_t tap) const {
    return (tap % g.stride * columns + tap / g.stride) * unit / 2 * 64;
  }
};

// The packed rows: of grad those of a band, of x those that the band needs. Row i of x lies in place i modulo `x_rows`,
// so that the next band finds the rows that both need.
struct Packed {
  int64_t band, x_rows;         // the most rows of grad and of x
  int64_t grad_group, x_group;  // bytes from 16 channels to the next 16
  char *grad, *x;

  FD_HD Packed(const Gradient& g, const Part& part, const Layout& layout, int64_t room, int64_t most_rows) {
    const int64_t groups = divide_up(g.inputs, kBlock) * 2;
    const int64_t grad_row = part.outputs() * layout.chunks * 64, x_row = groups * layout.x_row;
    const int64_t fit = (room - (g.side - g.stride) * x_row) / (grad_row + g.stride * x_row);
    const int64_t least = divide_up(kChunksOfPiece, layout.chunks);
    band = std::min(most_rows, std::max(fit, least));
    x_rows = (band - 1) * g.stride + g.side;
    grad_group = band * layout.chunks * 1024;
    x_group = x_rows * layout.x_row;
    grad = reinterpret_cast<char*>(buffer(part.outputs() / 16 * grad_group / 4, 0));
    x = reinterpret_cast<char*>(buffer(groups * x_group / 4, 1));
  }
};

#if FD_AMX
FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8")
namespace amx {
#define FD_LANES 16
#define FD_BFLOAT16 1
#include "simd/vec.h"
#include "amx/tile_gemm.h"

constexpr int64_t kTileWords = kTileBytes / 4, kSumsWords = 4 * kTileWords;  // of 32 x 32 sums

// The first channels of 32, as many as there are.
FD_HD __mmask32 first_channels(int64_t count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }

// 32 channels of two pixels, as pairs of numbers of the same channel; a null pointer stands for zeros. The first half
// has channels 0-3, 8-11, 16-19 and 24-27, the second the others: this order takes the fewest instructions.
struct Pairs {
  __m512i halves[2];

  FD_HD Pairs(const uint16_t* first, const uint16_t* second, __mmask32 mask) {
    const __m512i a = first == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, first);
    const __m512i b = second == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, second);
    halves[0] = _mm512_unpacklo_epi16(a, b);
    halves[1] = _mm512_unpackhi_epi16(a, b);
  }
};

// In which half a channel is, and at which place.
FD_HD int64_t half_of(int64_t channel) { return channel / 4 % 2; }
FD_HD int64_t place_of(int64_t channel) { return channel / 8 * 4 + channel % 4; }

FD_HD void pack_input_row(const Gradient& g, const Layout& layout, const Packed& p, int64_t row) {
  const int64_t blocks = divide_up(g.inputs, kBlock), image = g.height * g.width * g.x_pixel;
  char* const to_row = p.x + row % p.x_rows * layout.x_row;
  const uint16_t* const from_row = g.x + (layout.first_image * g.height + row) * g.width * g.x_pixel;
  for (int64_t group = 0; !layout.whole && group < 2 * blocks; ++group) {
    memset(to_row + group * p.x_group + layout.x_row - kTileBytes, 0, kTileBytes);
  }
  for (int64_t i = 0; i < layout.phases(g) * layout.columns; ++i) {
    const int64_t column = i % layout.columns * g.stride + i / layout.columns - g.padding;
    const bool exists = column >= 0 && column < g.width;
    if (!exists && layout.whole) continue;
    for (int64_t block = 0; block < blocks; ++block) {
      char* to = to_row + 2 * block * p.x_group + i * layout.unit / 2 * kRowBytes;
      if (!exists) {
        memset(to, 0, layout.unit / 2 * kRowBytes);
        memset(to + p.x_group, 0, layout.unit / 2 * kRowBytes);
        continue;
      }
      const __mmask32 mask = first_channels(g.inputs - kBlock * block);
      const uint16_t* from = from_row + column * g.x_pixel + kBlock * block;
      for (int64_t n = 0; n < layout.images; n += 2, to += kRowBytes, from += 2 * image) {
        const Pairs pairs(from, n + 1 < layout.images ? from + image : nullptr, mask);
        _mm512_store_si512(to, pairs.halves[0]);
        _mm512_store_si512(to + p.x_group, pairs.halves[1]);
      }
    }
  }
}

// Transposes the pairs of 32 pixels to a tile whose rows are channels.
FD_HD void store_transposed(char* to, __m512i (&pairs)[16]) {
  transpose(pairs);
#pragma GCC unroll 16
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(to + i * kRowBytes, pairs[i]);
}

// Also adds the row to the gradient of the bias, [block][half][16]. number: of the row in its band.
FD_HD void pack_gradient_row(const Gradient& g, const Part& part, const Layout& layout, const Packed& p, int64_t row,
                             int64_t number, float* bias) {
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3F80);
  for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
    const uint16_t* pixels[kChunk];
    for (int64_t i = 0; i < kChunk; ++i) {
      const int64_t column = (chunk * kChunk + i) / layout.unit, n = (chunk * kChunk + i) % layout.unit;
      const int64_t at = ((layout.first_image + n) * g.out_height + row) * g.out_width + column;
      pixels[i] = n < layout.images && column < g.out_width ? g.grad + at * g.grad_pixel : nullptr;
    }
    for (int64_t block = 0; block < part.outputs() / kBlock; ++block) {
      const int64_t k = (part.first_block + block) * kBlock;
      const __mmask32 mask = first_channels(g.outputs - k);
      const auto pixel = [&](int64_t i) FD_INLINE { return pixels[i] == nullptr ? nullptr : pixels[i] + k; };
      float* sums = bias + block * kBlock;
      __m512i words[16], others[16];
      __m512 sum = _mm512_load_ps(sums), other = _mm512_load_ps(sums + 16);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i) {
        const Pairs pairs(pixel(2 * i), pixel(2 * i + 1), mask);
        words[i] = pairs.halves[0];
        others[i] = pairs.halves[1];
        sum = _mm512_dpbf16_ps(sum, (__m512bh)words[i], ones);
        other = _mm512_dpbf16_ps(other, (__m512bh)others[i], ones);
      }
      _mm512_store_ps(sums, sum);
      _mm512_store_ps(sums + 16, other);
      char* to = p.grad + 2 * block * p.grad_group + (number * layout.chunks + chunk) * kTileBytes;
      store_transposed(to, words);
      store_transposed(to + p.grad_group, others);
    }
  }
}

// The sums of 32 outputs by 32 inputs in four tile registers, which come from memory and go back there.
struct Sums {
  float* at;

  FD_HD Sums(float* at_, bool begins) : at(at_) {
    asm volatile("" ::: "memory");  // GCC's tile intrinsics do not say what memory they read
    if (begins) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, at, kRowBytes);
      _tile_loadd(1, at + kTileWords, kRowBytes);
      _tile_loadd(2, at + 2 * kTileWords, kRowBytes);
      _tile_loadd(3, at + 3 * kTileWords, kRowBytes);
    }
  }

  FD_HD void add(const Packed& p, const char* grad, const char* x, int64_t chunks) const {
    for (int64_t chunk = 0; chunk < chunks; ++chunk, grad += kTileBytes, x += kTileBytes) {
      _tile_loadd(4, grad, kRowBytes);
      _tile_loadd(6, x, kRowBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, x + p.x_group, kRowBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, grad + p.grad_group, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  FD_HD void store() const {
    _tile_stored(0, at, kRowBytes);
    _tile_stored(1, at + kTileWords, kRowBytes);
    _tile_stored(2, at + 2 * kTileWords, kRowBytes);
    _tile_stored(3, at + 3 * kTileWords, kRowBytes);
    asm volatile("" ::: "memory");
  }
};

// Adds the products of the packed rows from `first` on and before `last`, for a block of outputs and one of inputs.
// sums: [tap]. begins: whether they are still to be set to zero.
FD_HD void multiply(const Gradient& g, const Layout& layout, const Packed& p, int64_t first, int64_t last,
                    const char* grad, const char* x, bool begins, float* sums) {
  const int64_t columns = layout.chunks;
  const int64_t wide = std::min(columns, kChunksOfPiece), high = std::max<int64_t>(1, kChunksOfPiece / columns);
  const int64_t pieces = divide_up(columns, wide);
  for (int64_t r = 0; r < g.side; ++r) {
    float* of_row = sums + r * g.side * kSumsWords;
    bool first_piece = begins;
    const Range rows = Range(r, g.stride, g.padding, g.height, g.out_height).within(first, last);
    for (int64_t row = rows.first; row < rows.last; row += high) {
      const int64_t end = std::min(row + high, rows.last);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t from = columns * piece / pieces, to = columns * (piece + 1) / pieces;
        for (int64_t s = 0; s < g.side; ++s) {
          const Range existing(s, g.stride, g.padding, g.width, g.out_width);
          const Range range = layout.whole ? existing.within(from, to) : Range(from, to);
          const Sums out(of_row + s * kSumsWords, first_piece);
          for (int64_t i = row; i < end; ++i) {
            const int64_t in = (i * g.stride + r - g.padding) % p.x_rows;
            out.add(p, grad + ((i - first) * layout.chunks + range.first) * kTileBytes,
                    x + in * layout.x_row + layout.start(g, s) + range.first * kTileBytes, range.size());
          }
          out.store();
        }
        first_piece = false;
      }
    }
    if (first_piece) memset(of_row, 0, g.side * kSumsWords * sizeof(float));
  }
}

// Writes the sums of a block to the part's weight.
FD_HD void write_block(const Gradient& g, const Part& part, int64_t k, int64_t c, const float* sums) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < std::min(kBlock, g.outputs - k); ++i) {
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      float* to = part.weight + ((k + i) * g.taps() + tap) * g.inputs + c;
      const float* from = sums + tap * kSumsWords + half_of(i) * 2 * kTileWords + place_of(i) * 16;
      const __m512 a = _mm512_load_ps(from), b = _mm512_load_ps(from + kTileWords);
      for (int64_t half = 0; half < 2; ++half) {
        const __mmask16 mask = first_lanes(g.inputs - c - 16 * half);
        _mm512_mask_storeu_ps(to + 16 * half, mask, _mm512_permutex2var_ps(a, half == 0 ? low : high, b));
      }
    }
  }
}

inline void differentiate(const Gradient& g, const Part& part, int64_t room) {
  load_shapes();
  float* bias = buffer(part.outputs(), 3);
  memset(bias, 0, part.outputs() * sizeof(float));
  const int64_t blocks = divide_up(g.inputs, kBlock), of_block = g.taps() * kSumsWords;
  float* sums = nullptr;
  for (int64_t at = part.first_row; at < part.last_row;) {
    const int64_t bunch = at / g.out_height, row = at % g.out_height;
    const int64_t end = std::min(g.out_height, row + part.last_row - at);
    const Layout layout(g, bunch);
    const Packed p(g, part, layout, room, end - row);
    // With a single band, a block's sums are written at once, and the next block takes their memory.
    const bool only = at == part.first_row && at + p.band >= part.last_row;
    if (sums == nullptr) sums = buffer((only ? 1 : part.outputs() / kBlock * blocks) * of_block, 2);
    int64_t packed = std::max<int64_t>(0, row * g.stride - g.padding);  // rows of x before this one
    for (int64_t first = row; first < end; first += p.band) {
      const int64_t last = std::min(first + p.band, end);
      const int64_t needed = std::min(g.height, (last - 1) * g.stride + g.side - g.padding);
      for (; packed < needed; ++packed) pack_input_row(g, layout, p, packed);
      for (int64_t i = first; i < last; ++i) pack_gradient_row(g, part, layout, p, i, i - first, bias);
      const bool begins = at + first - row == part.first_row, ends = at + last - row == part.last_row;
      for (int64_t k = 0; k < part.outputs(); k += kBlock) {
        for (int64_t c = 0; c < blocks; ++c) {
          float* of = only ? sums : sums + (k / kBlock * blocks + c) * of_block;
          multiply(g, layout, p, first, last, p.grad + k / 16 * p.grad_group, p.x + 2 * c * p.x_group, begins, of);
          if (ends) write_block(g, part, part.first_block * kBlock + k, c * kBlock, of);
        }
      }
    }
    at += end - row;
  }
  for (int64_t k = part.first_block * kBlock; k < std::min(part.last_block * kBlock, g.outputs); ++k) {
    const int64_t i = k - part.first_block * kBlock, channel = i % kBlock;
    part.bias[k] = bias[i - channel + half_of(channel) * 16 + place_of(channel)];
  }
  _tile_release();
}
}  // namespace amx
FD_END_TARGET

// Rows are divided into groups, whose gradients are added up afterwards, where those are small beside the images; by
// the shape alone, so that the number of threads does not change the result. Outputs are divided by that number.
void run(const Gradient& g, const Tensor& like) {
  const int64_t weight = g.outputs * g.taps() * g.inputs, size = weight + g.outputs, rows = g.rows();
  const int64_t numbers = g.images * g.out_height * g.out_width * (g.outputs + g.inputs);
  int64_t groups = 1;
  while (groups < kMostGroups && 2 * groups * kLeastRowsOfGroup <= rows && 16 * groups * size <= numbers) groups *= 2;
  const int64_t room = std::max(kPackedBytes, 4 * size);
  const int64_t blocks = divide_up(g.outputs, kBlock), threads = torch::stable::get_num_threads();
  const int64_t parts = std::min(blocks, divide_up(threads, groups));
  Tensor sums = torch::stable::new_empty(like, {groups == 1 ? 0 : groups * size}, ScalarType::Float);
  float* of_groups = groups == 1 ? nullptr : static_cast<float*>(sums.mutable_data_ptr());
  parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / parts, i = item % parts;
      float* to = groups == 1 ? g.weight : of_groups + group * size;
      amx::differentiate(g, {rows * group / groups, rows * (group + 1) / groups, blocks * i / parts,
                             blocks * (i + 1) / parts, to, groups == 1 ? g.bias : to + weight}, room);
    }
  });
  if (groups == 1) return;
  parallel_for(0, size, kAddsPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float sum = of_groups[i];
      for (int64_t group = 1; group < groups; ++group) sum += of_groups[group * size + i];
      (i < weight ? g.weight[i] : g.bias[i - weight]) = sum;
    }
  });
}
#endif

std::tuple<Tensor, Tensor> convolution_weight_gradient(const Tensor& grad, const Tensor& x, int64_t side,
                                                       int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(simd_in_use() == Simd::amx, "this processor has no AMX");
  STD_TORCH_CHECK(side == 1 || side == kMostSide, "the kernel must be 1 x 1 or 3 x 3");
  STD_TORCH_CHECK((stride == 1 || stride == 2) && padding >= 0 && padding < side,
                  "the stride must be 1 or 2, and the padding less than the kernel's side");
  STD_TORCH_CHECK(grad.scalar_type() == ScalarType::BFloat16 && x.scalar_type() == ScalarType::BFloat16,
                  "grad and x must be bfloat16");
  STD_TORCH_CHECK(grad.dim() == 4 && x.dim() == 4 && grad.size(0) == x.size(0),
                  "grad must be [N, K, H', W'], and x [N, C, H, W]");
  for (int64_t d = 2; d < 4; ++d) {
    STD_TORCH_CHECK(x.numel() == 0 || (x.size(d) + 2 * padding >= side &&
                                       grad.size(d) == (x.size(d) + 2 * padding - side) / stride + 1),
                    "grad must have the size of the convolution's output");
  }
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
         pixel_distance(grad, "grad"), pixel_distance(x, "x"), x.size(0), x.size(2), x.size(3), grad.size(2),
         grad.size(3), outputs, inputs, side, stride, padding, static_cast<float*>(weight.mutable_data_ptr()),
         static_cast<float*>(bias.mutable_data_ptr())},
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
