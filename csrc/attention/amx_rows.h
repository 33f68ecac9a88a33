// Rows of queries, keys and values as AMX's factors, rounded to bfloat16. Included after amx/tile_gemm.h.

// The positions of a head as rows of `width` numbers, `step` numbers apart.
template <class T>
struct HeadRows {
  const T* data;
  int64_t step, positions, width;

  // 16 numbers of a row from number `at` on; 0 beyond the row's end and beyond the last position.
  FD_HD Vec read(int64_t position, int64_t at) const {
    const int64_t remaining = position < positions ? width - at : 0;
    const T* row = data + position * step + at;
    return remaining >= kLanes ? load(row) : remaining > 0 ? load(row, remaining) : Vec{};
  }
};

template <class T, class Arguments>
FD_HD HeadRows<T> rows_of(const InputHeads& input, int64_t head, int64_t positions, const Arguments& g) {
  return {input.at<const T>(head / g.heads, head % g.heads), input.row, positions, g.width};
}

// 32 numbers of each of 32 rows, as [row][64 bytes].
template <class T>
FD_HD void pack_chunk(const HeadRows<T>& rows, int64_t block, int64_t chunk, char* to) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const int64_t row = block * kBlock + i, at = chunk * kBlock;
    store_rounded(to + i * kRowBytes, rows.read(row, at), rows.read(row, at + kLanes));
  }
}

// 32 rows as a left factor, chunk after chunk of 32 numbers.
template <class T>
FD_HD void pack_left(const HeadRows<T>& rows, int64_t block, int64_t chunks, char* to) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk) pack_chunk(rows, block, chunk, to + chunk * kBlock * kRowBytes);
}

// 32 rows, transposed, as right factors of products that sum over the width: tiles [pair of numbers][16 rows][2].
template <class T>
FD_HD void pack_transposed(const HeadRows<T>& rows, int64_t block, int64_t chunks, char* to) {
  alignas(64) char left[kBlock][kRowBytes];
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    pack_chunk(rows, block, chunk, left[0]);
    for (int64_t tile = 0; tile < 2; ++tile, to += kTileBytes) {
      __m512i words[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) words[i] = _mm512_load_si512(left[16 * tile + i]);
      transpose(words);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(to + i * kRowBytes, words[i]);
    }
  }
}

// 32 rows of 16 numbers, from number `at` on, as a right factor of products that sum over rows: a tile
// [pair of rows][16 numbers][2].
template <class T>
FD_HD void pack_pairs_tile(const HeadRows<T>& rows, int64_t block, int64_t at, char* to) {
  for (int64_t pair = 0; pair < kBlock / 2; ++pair, to += kRowBytes) {
    const int64_t row = block * kBlock + 2 * pair;
    alignas(64) char both[kRowBytes];
    store_rounded(both, rows.read(row, at), rows.read(row + 1, at));
    _mm512_storeu_si512(to, interleaved(_mm512_load_si512(both)));
  }
}

// 32 rows as right factors of products that sum over rows, for each chunk of 32 numbers, `chunk_step` bytes apart.
template <class T>
FD_HD void pack_pairs(const HeadRows<T>& rows, int64_t block, int64_t chunks, char* to, int64_t chunk_step) {
  for (int64_t chunk = 0; chunk < chunks; ++chunk, to += chunk_step) {
    for (int64_t tile = 0; tile < 2; ++tile) {
      pack_pairs_tile(rows, block, chunk * kBlock + tile * kLanes, to + tile * kTileBytes);
    }
  }
}

// 2^(u + kShift) for u + kShift up to 127, and 0 for -infinity; u is the sum of an integer and r, from 0 to 1. The
// relative error is below 2^-23 if kPrecise, else 2^-13, for weights that are rounded to bfloat16. NaN stays NaN.
template <bool kPrecise, int kShift = 0>
FD_HD Vec exp2_of(Vec u) {
  constexpr float kUnit = 1 << kShift;
  const Vec r = (Vec)_mm512_reduce_ps((__m512)u, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec p;
  if constexpr (!kPrecise) {
    p = fma(spread(kUnit * 0x1.3f96a4p-4f), r, spread(kUnit * 0x1.cefc4ep-3f));
    p = fma(p, r, spread(kUnit * 0x1.64444ap-1f));
    p = fma(p, r, spread(kUnit * 0x1.fff632p-1f));
  } else {
    p = fma(spread(kUnit * 0x1.c72118p-13f), r, spread(kUnit * 0x1.461956p-10f));
    p = fma(p, r, spread(kUnit * 0x1.3d28p-7f));
    p = fma(p, r, spread(kUnit * 0x1.c685p-5f));
    p = fma(p, r, spread(kUnit * 0x1.ebfd9ep-3f));
    p = fma(p, r, spread(kUnit * 0x1.62e42ap-1f));
    p = fma(p, r, spread(kUnit));
  }
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)u);
}

// Up to 32 queries of a head, and their online softmax after some blocks of keys.
struct QueryBlock {
  int64_t first, count;      // positions
  char* queries;             // packed as a left factor, negated where the scale is negative
  float* sums;               // [tile of 16 columns][32 rows][16]: the weighted sums of values
  float* weight_sums;        // [32][16]: the sums of the weights, of every 16th key in each lane
  float maximum[kBlock];     // the largest logit, without its factor
  float factor[kBlock];      // of the logits, for exponents of 2
  float rescale[2][kBlock];  // factors of the sums before an even and before an odd block of keys
};
