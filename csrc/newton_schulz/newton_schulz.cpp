// fused_diffusion::newton_schulz on a CPU with AMX: Muon orthogonalises a matrix X by the iteration
//
//   G = X transposed(X),  X <- a X + (b G + c G G) X  (Jordan et al. 2024).
//
// As in torch.optim.Muon, sums are in float32, and each product is rounded to bfloat16. Here a matrix stays in the cache
// from product to product, and half of each symmetric product is copied.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>

#include "simd/dispatch.h"
#include "common/floats.h"
#include "common/scratch.h"
#include "common/targets.h"

#if FD_AMX
#include <immintrin.h>
#endif

namespace fused_diffusion {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 32;  // rows and columns of a product that are computed together

#if FD_AMX
FD_TARGET("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-bf16,amx-int8")
namespace amx {
#define FD_LANES 16
#define FD_BFLOAT16 1
#include "simd/vec.h"
#include "amx/tile_gemm.h"

// A matrix of bfloat16, filled up with zeros to whole blocks. Rows are an odd number of cache lines apart, so that those
// of a tile do not meet in the same sets of the cache.
struct Matrix {
  char* at;
  int64_t rows, columns, step;  // rows and columns: multiples of 32; step: bytes

  static FD_HD int64_t step_of(int64_t columns) { return (columns / kBlock + 1 - columns / kBlock % 2) * kRowBytes; }
  FD_HD char* row(int64_t i) const { return at + i * step; }
};

// The right factor of a product as tile_gemm.h reads it: for each 32 columns, [32 rows][2][tile].
struct Right {
  char* at;
  int64_t chunks;  // of 32 rows

  FD_HD char* tiles(int64_t column_block, int64_t chunk) const {
    return at + (column_block * chunks + chunk) * 2 * kTileBytes;
  }
};

FD_HD void pack(const Matrix& m, const Right& to) {
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

FD_HD void pack_transposed(const Matrix& m, const Right& to) {
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

FD_HD __m512 widened(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
}

// A block of sums on its way to the output, row by row, while AMX is busy with the next block.
struct Finisher {
  const float* sums;
  const char* addend;  // or null
  char* to;
  int64_t addend_step, step, left = 0;

  FD_HD void advance(int64_t count, float scale, float before) {
    for (; count > 0 && left > 0; --count, --left, sums += kBlock, to += step) {
      __m512 low = _mm512_mul_ps(_mm512_load_ps(sums), _mm512_set1_ps(scale));
      __m512 high = _mm512_mul_ps(_mm512_load_ps(sums + 16), _mm512_set1_ps(scale));
      if (addend != nullptr) {
        const __m256i* from = reinterpret_cast<const __m256i*>(addend);
        low = _mm512_fmadd_ps(_mm512_set1_ps(before), widened(_mm256_load_si256(from)), low);
        high = _mm512_fmadd_ps(_mm512_set1_ps(before), widened(_mm256_load_si256(from + 1)), high);
        addend += addend_step;
      }
      _mm512_store_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }
};

// out = before * addend + scale * left right; addend may be null. symmetric: whether the product is, so that the blocks
// below the diagonal are copied.
FD_HD void multiply(const Matrix& left, const Right& right, float scale, const Matrix* addend, float before,
                    const Matrix& out, bool symmetric) {
  alignas(64) float sums[2][kBlock * kBlock];
  const int64_t tap = 0, chunks = left.columns / kBlock, share = divide_up(kBlock, chunks);
  Finisher last;
  int64_t items = 0;
  for (int64_t block = 0; block < out.columns / kBlock; ++block) {
    for (int64_t row = 0; row < (symmetric ? (block + 1) * kBlock : out.rows); row += kBlock) {
      Factors f{};
      f.left = left.row(row), f.row_step = left.step, f.chunk_step = kRowBytes, f.chunks = chunks;
      f.taps = &tap, f.tap_count = 1, f.right = right.tiles(block, 0);
      float* here = sums[items++ % 2];
      sum_products<2, 2, 1>(f, here, kBlock * sizeof(float), [&]() FD_INLINE { last.advance(share, scale, before); });
      last.sums = here, last.to = out.row(row) + block * kRowBytes, last.step = out.step, last.left = kBlock;
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
    const Right across{packed, columns / kBlock}, down{packed, rows / kBlock};
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
}  // namespace amx
FD_END_TARGET
#endif

Tensor newton_schulz(const Tensor& x, int64_t steps, double a, double b, double c) {
  STD_TORCH_CHECK(simd_in_use() == Simd::amx, "this processor has no AMX");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && x.dim() == 2 && x.is_contiguous(),
                  "x must be a contiguous matrix of bfloat16");
  STD_TORCH_CHECK(x.size(0) <= x.size(1), "x must not be taller than wide");
  STD_TORCH_CHECK(x.const_data_ptr() != nullptr || x.numel() == 0, "x must have memory");
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)}, ScalarType::BFloat16);
#if FD_AMX
  if (x.numel() > 0) {
    amx::iterate(static_cast<const uint16_t*>(x.const_data_ptr()), static_cast<uint16_t*>(out.mutable_data_ptr()),
                 x.size(0), x.size(1), steps, static_cast<float>(a), static_cast<float>(b), static_cast<float>(c));
  }
#endif
  return out;
}

}  // namespace
}  // namespace fused_diffusion

STABLE_TORCH_LIBRARY_IMPL(fused_diffusion, CPU, m) {
  m.impl("newton_schulz", TORCH_BOX(&fused_diffusion::newton_schulz));
}
