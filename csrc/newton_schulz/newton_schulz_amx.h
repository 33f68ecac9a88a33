// The Newton-Schulz iteration by AMX, for newton_schulz/newton_schulz.cpp.

#include "amx/tile_gemm.h"

// A matrix of bfloat16, padded with zeros to whole blocks. Rows are an odd number of cache lines apart, so that the
// rows of a tile fall on different sets of the cache.
struct Matrix {
  char* at;
  int64_t rows, columns, step;  // rows and columns: multiples of 32; step: bytes

  static FD_HD int64_t step_of(int64_t columns) { return (columns / kBlock + 1 - columns / kBlock % 2) * kRowBytes; }
  FD_HD char* row(int64_t i) const { return at + i * step; }
};

// The right factor of a product as amx/tile_gemm.h reads it: for each 32 columns, [32 rows][2][tile].
struct RightFactor {
  char* at;
  int64_t chunks;  // of 32 rows

  FD_HD char* tiles(int64_t column_block, int64_t chunk) const {
    return at + (column_block * chunks + chunk) * 2 * kTileBytes;
  }
};

FD_HD void pack(const Matrix& m, const RightFactor& to) {
  for (int64_t chunk = 0; chunk < m.rows / kBlock; ++chunk) {
    for (int64_t block = 0; block < m.columns / kBlock; ++block) {
      char* tiles = to.tiles(block, chunk);
      for (int64_t i = 0; i < kBlock; i += 2, tiles += kRowBytes) {
        const char* from = m.row(chunk * kBlock + i) + block * kRowBytes;
        for (int64_t half = 0; half < 2; ++half) {
          const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + 32 * half));
          const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + m.step + 32 * half));
          _mm512_store_si512(tiles + half * kTileBytes,
                             interleaved(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1)));
        }
      }
    }
  }
}

FD_HD void pack_transposed(const Matrix& m, const RightFactor& to) {
  for (int64_t block = 0; block < m.rows / kBlock; ++block) {
    for (int64_t chunk = 0; chunk < m.columns / kBlock; ++chunk) {
      for (int64_t half = 0; half < 2; ++half) {
        char* tile = to.tiles(block, chunk) + half * kTileBytes;
        __m512i rows[16];
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) {
          rows[i] = _mm512_load_si512(m.row(block * kBlock + half * 16 + i) + chunk * kRowBytes);
        }
        transpose(rows);
#pragma GCC unroll 16
        for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(tile + i * kRowBytes, rows[i]);
      }
    }
  }
}

FD_HD __m512 to_float32(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

// Writes a block of sums to the output, row by row, so that this can be done while AMX is busy with the next block.
struct BlockWriter {
  const float* sums;
  const char* addend;  // or null
  char* to;
  int64_t addend_step, step, remaining = 0;

  FD_HD void advance(int64_t count, float scale, float before) {
    for (; count > 0 && remaining > 0; --count, --remaining, sums += kBlock, to += step) {
      __m512 low = _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(scale));
      __m512 high = _mm512_mul_ps(_mm512_load_ps(sums + 16), _mm512_set1_ps(scale));
      if (addend != nullptr) {
        const __m256i* from = reinterpret_cast<const __m256i*>(addend);
        low = _mm512_fmadd_ps(_mm512_set1_ps(before), to_float32(_mm256_load_si256(from)), low);
        high = _mm512_fmadd_ps(_mm512_set1_ps(before), to_float32(_mm256_load_si256(from + 1)), high);
        addend += addend_step;
      }
      _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
};

// out = before * addend + scale * left right; addend may be null. symmetric: whether the product is symmetric, so
// that only blocks on and above its diagonal are computed, and the others copied.
FD_HD void multiply(const Matrix& left, const RightFactor& right, float scale, const Matrix* addend, float before,
                    const Matrix& out, bool symmetric) {
  alignas(64) float sums[2][kBlock * kBlock];
  const int64_t tap = 0, chunks = left.columns / kBlock, rows_per_chunk = divide_up(kBlock, chunks);
  BlockWriter last;
  int64_t items = 0;
  for (int64_t block = 0; block < out.columns / kBlock; ++block) {
    for (int64_t row = 0; row < (symmetric ? (block + 1) * kBlock : out.rows); row += kBlock) {
      Factors f{};
      f.left = left.row(row), f.row_step = left.step, f.chunk_step = kRowBytes, f.chunks = chunks;
      f.taps = &tap, f.tap_count = 1, f.right = right.tiles(block, 0);
      float* here = sums[items++ % 2];
      sum_products<2, 2, 1>(f, here, kBlock * sizeof(float),
                            [&]() FD_INLINE { last.advance(rows_per_chunk, scale, before); });
      last.sums = here, last.to = out.row(row) + block * kRowBytes, last.step = out.step, last.remaining = kBlock;
      last.addend = addend == nullptr ? nullptr : addend->row(row) + block * kRowBytes;
      last.addend_step = addend == nullptr ? 0 : addend->step;
    }
  }
  last.advance(kBlock, scale, before);
  for (int64_t i = kBlock; symmetric && i < out.rows; ++i) {
    for (int64_t j = 0; j < i / kBlock * kBlock; ++j) memcpy(out.row(i) + 2 * j, out.row(j) + 2 * i, 2);
  }
}

inline void iterate(const uint16_t* from, uint16_t* result, int64_t height, int64_t width, int64_t steps, float a,
                    float b, float c) {
  load_shapes();
  const int64_t rows = divide_up(height, kBlock) * kBlock, columns = divide_up(width, kBlock) * kBlock;
  const int64_t step = Matrix::step_of(columns), small = Matrix::step_of(rows);
  char* memory = reinterpret_cast<char*>(buffer((rows * (2 * step + 2 * small) + 2 * rows * columns) / 4, 0));
  Matrix x{memory, rows, columns, step}, y{x.at + rows * step, rows, columns, step};
  const Matrix gram{y.at + rows * step, rows, rows, small}, update{gram.at + rows * small, rows, rows, small};
  char* packed = update.at + rows * small;
  memset(x.at, 0, rows * step);
  for (int64_t i = 0; i < height; ++i) memcpy(x.row(i), from + i * width, 2 * width);
  for (int64_t i = 0; i < steps; ++i) {
    const RightFactor across{packed, columns / kBlock}, down{packed, rows / kBlock};
    pack_transposed(x, across);
    multiply(x, across, 1.0f, nullptr, 0.0f, gram, true);
    pack(gram, down);
    multiply(gram, down, c, &gram, b, update, true);
    pack(x, down);
    multiply(update, down, 1.0f, &x, a, y, false);
    std::swap(x, y);
  }
  for (int64_t i = 0; i < height; ++i) memcpy(result + i * width, x.row(i), 2 * width);
  _tile_release();
}
