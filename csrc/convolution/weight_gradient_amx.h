// The weight gradient of a convolution by AMX, for convolution/weight_gradient.cpp.

#include "amx/tile_gemm.h"

constexpr int64_t kTileFloats = kTileBytes / 4, kSumsFloats = 4 * kTileFloats;  // of 32 x 32 sums

// A mask of the first `count` channels of 32, or all if there are more.
FD_HD __mmask32 first_channels(int64_t count) { return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1; }

// 32 channels of two pixels, as pairs of numbers of the same channel; a null pointer stands for zeros. The first half
// has channels 0-3, 8-11, 16-19 and 24-27, the second half the other channels: this order takes the fewest
// instructions.
struct Pairs {
  __m512i halves[2];

  FD_HD Pairs(const uint16_t* first, const uint16_t* second, __mmask32 mask) {
    const __m512i a = first == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, first);
    const __m512i b = second == nullptr ? _mm512_setzero_si512() : _mm512_maskz_loadu_epi16(mask, second);
    halves[0] = _mm512_unpacklo_epi16(a, b);
    halves[1] = _mm512_unpackhi_epi16(a, b);
  }
};

// The half that a channel is in, and its index there.
FD_HD int64_t half_of(int64_t channel) { return channel / 4 % 2; }
FD_HD int64_t place_of(int64_t channel) { return channel / 8 * 4 + channel % 4; }

FD_HD void pack_input_row(const WeightGradient& g, const BunchLayout& layout, const PackedRows& p, int64_t row) {
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

// Packs a row of grad, and adds it to the gradient of the bias, [block][half][16]. number: of the row in its band.
FD_HD void pack_gradient_row(const WeightGradient& g, const ThreadPart& part, const BunchLayout& layout,
                             const PackedRows& p, int64_t row, int64_t number, float* bias) {
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

// The sums of 32 outputs by 32 inputs in four tile registers, loaded from memory and stored there.
struct Sums {
  float* at;

  FD_HD Sums(float* at_, bool begins) : at(at_) {
    asm volatile("" ::: "memory");  // GCC's tile intrinsics do not declare which memory they read
    if (begins) {
      _tile_zero(FD_SUM_00);
      _tile_zero(FD_SUM_01);
      _tile_zero(FD_SUM_10);
      _tile_zero(FD_SUM_11);
    } else {
      _tile_loadd(FD_SUM_00, at, kRowBytes);
      _tile_loadd(FD_SUM_01, at + kTileFloats, kRowBytes);
      _tile_loadd(FD_SUM_10, at + 2 * kTileFloats, kRowBytes);
      _tile_loadd(FD_SUM_11, at + 3 * kTileFloats, kRowBytes);
    }
  }

  FD_HD void add(const PackedRows& p, const char* grad, const char* x, int64_t chunks) const {
    for (int64_t chunk = 0; chunk < chunks; ++chunk, grad += kTileBytes, x += kTileBytes) {
      _tile_loadd(FD_LEFT_0, grad, kRowBytes);
      _tile_loadd(FD_RIGHT_0, x, kRowBytes);
      _tile_dpbf16ps(FD_SUM_00, FD_LEFT_0, FD_RIGHT_0);
      _tile_loadd(FD_RIGHT_1, x + p.x_group, kRowBytes);
      _tile_dpbf16ps(FD_SUM_01, FD_LEFT_0, FD_RIGHT_1);
      _tile_loadd(FD_LEFT_1, grad + p.grad_group, kRowBytes);
      _tile_dpbf16ps(FD_SUM_10, FD_LEFT_1, FD_RIGHT_0);
      _tile_dpbf16ps(FD_SUM_11, FD_LEFT_1, FD_RIGHT_1);
    }
  }

  FD_HD void store() const {
    _tile_stored(FD_SUM_00, at, kRowBytes);
    _tile_stored(FD_SUM_01, at + kTileFloats, kRowBytes);
    _tile_stored(FD_SUM_10, at + 2 * kTileFloats, kRowBytes);
    _tile_stored(FD_SUM_11, at + 3 * kTileFloats, kRowBytes);
    asm volatile("" ::: "memory");
  }
};

// Adds the products of the packed rows from `first` on and before `last`, for a block of outputs and one of inputs.
// sums: [tap]. begins: whether the sums begin at zero.
FD_HD void multiply(const WeightGradient& g, const BunchLayout& layout, const PackedRows& p, int64_t first,
                    int64_t last, const char* grad, const char* x, bool begins, float* sums) {
  const int64_t columns = layout.chunks;
  const int64_t wide = std::min(columns, kChunksOfPiece), high = std::max<int64_t>(1, kChunksOfPiece / columns);
  const int64_t pieces = divide_up(columns, wide);
  for (int64_t r = 0; r < g.side; ++r) {
    float* of_row = sums + r * g.side * kSumsFloats;
    bool first_piece = begins;
    const Range rows = Range(r, g.stride, g.padding, g.height, g.out_height).within(first, last);
    for (int64_t row = rows.first; row < rows.last; row += high) {
      const int64_t end = std::min(row + high, rows.last);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t from = columns * piece / pieces, to = columns * (piece + 1) / pieces;
        for (int64_t s = 0; s < g.side; ++s) {
          const Range existing(s, g.stride, g.padding, g.width, g.out_width);
          const Range range = layout.whole ? existing.within(from, to) : Range(from, to);
          const Sums out(of_row + s * kSumsFloats, first_piece);
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
    if (first_piece) memset(of_row, 0, g.side * kSumsFloats * sizeof(float));
  }
}

// Writes the sums of a block to its weight gradient.
FD_HD void write_block(const WeightGradient& g, const ThreadPart& part, int64_t k, int64_t c, const float* sums) {
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  for (int64_t i = 0; i < std::min(kBlock, g.outputs - k); ++i) {
    for (int64_t tap = 0; tap < g.taps(); ++tap) {
      float* to = part.weight + ((k + i) * g.taps() + tap) * g.inputs + c;
      const float* from = sums + tap * kSumsFloats + half_of(i) * 2 * kTileFloats + place_of(i) * 16;
      const __m512 a = _mm512_load_ps(from), b = _mm512_load_ps(from + kTileFloats);
      for (int64_t half = 0; half < 2; ++half) {
        const __mmask16 mask = first_lanes(g.inputs - c - 16 * half);
        _mm512_mask_storeu_ps(to + 16 * half, mask, _mm512_permutex2var_ps(a, half == 0 ? low : high, b));
      }
    }
  }
}

inline void differentiate(const WeightGradient& g, const ThreadPart& part, int64_t room) {
  load_shapes();
  float* bias = buffer(part.outputs(), 3);
  memset(bias, 0, part.outputs() * sizeof(float));
  const int64_t blocks = divide_up(g.inputs, kBlock), of_block = g.taps() * kSumsFloats;
  float* sums = nullptr;
  for (int64_t at = part.first_row; at < part.last_row;) {
    const int64_t bunch = at / g.out_height, row = at % g.out_height;
    const int64_t end = std::min(g.out_height, row + part.last_row - at);
    const BunchLayout layout(g, bunch);
    const PackedRows p(g, part, layout, room, end - row);
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
