// Matrix products on one instruction set: rows of the left factor are broadcast number by number, columns of the
// right factor lie in the lanes. Included after simd/vec.h, in the same namespace, with FD_PAIRS where the processor
// multiplies pairs of bfloat16.
//
// The right factor is packed in panels of kPanel columns, the last one as wide as it has to be: panel[depth][width].

typedef float UnalignedWord __attribute__((aligned(1), may_alias));

#if FD_LANES == 16
constexpr int kRows = 6, kColumns = 4;  // 24 sums, 4 columns, a broadcast
#elif FD_LANES == 8
constexpr int kRows = 6, kColumns = 2;
#else
constexpr int kRows = 4, kColumns = 2;
#endif

// What is multiplied is a word: a float, or a pair of bfloat16.
struct Singles {
  typedef float Element;
  static constexpr int kPack = 1;
  static FD_HD Vec multiply_add(Vec c, Vec a, Vec b) { return fma(a, b, c); }

  // Some columns of a row of a panel of this width.
  static FD_HD Vec columns(const float* panel, int64_t width, int64_t row, int64_t column) {
    return load(panel + row * width + column);
  }
};

#if FD_PAIRS
struct Pairs {
  typedef BFloat16 Element;
  static constexpr int kPack = 2;
  static FD_HD Vec multiply_add(Vec c, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }

  static FD_HD Vec columns(const float* panel, int64_t width, int64_t row, int64_t column) {
    const __m512i pairs = _mm512_loadu_si512(panel + row / 2 * width + column);
    return (Vec)(row % 2 == 0 ? _mm512_slli_epi32(pairs, 16) : _mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }
};
#endif

// The left factor: row i begins at rows[i], in bytes, and goes on for `depth` words behind each of `taps`.
struct Left {
  const char* const* rows;
  const int64_t* taps;
  int64_t tap_count, depth;
};

// Sums of kCount rows and kWidth vectors of columns, given to finish(row, vector, sum).
template <class Math, int kCount, int kWidth, class Finish>
FD_HD void multiply_block(const Left& left, int64_t first, const float* b, int64_t b_step, const Finish& finish) {
  Vec sum[kCount][kWidth] = {};
  const char* rows[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) rows[i] = left.rows[first + i];
  for (int64_t tap = 0; tap < left.tap_count; ++tap) {
    const int64_t offset = left.taps[tap];
    const int64_t end = offset + 4 * left.depth;
    for (int64_t at = offset; at < end; at += 4) {
      Vec right[kWidth];
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const Vec factor = spread(*reinterpret_cast<const UnalignedWord*>(rows[i] + at));
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) sum[i][j] = Math::multiply_add(sum[i][j], factor, right[j]);
      }
      b += b_step;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kWidth; ++j) finish(first + i, j, sum[i][j]);
  }
}

template <class Math, int kWidth, class Finish>
FD_HD void multiply_rows(const Left& left, int64_t begin, int64_t end, const float* b, int64_t b_step,
                         const Finish& finish) {
  int64_t blocks = (end - begin + kRows - 1) / kRows;
  for (int64_t row = begin; row < end; --blocks) {
    const int64_t count = (end - row + blocks - 1) / blocks;  // of one size, or two
    switch (count) {
#if FD_LANES >= 8
      case 6: multiply_block<Math, 6, kWidth>(left, row, b, b_step, finish); break;
      case 5: multiply_block<Math, 5, kWidth>(left, row, b, b_step, finish); break;
#endif
      case 4: multiply_block<Math, 4, kWidth>(left, row, b, b_step, finish); break;
      case 3: multiply_block<Math, 3, kWidth>(left, row, b, b_step, finish); break;
      case 2: multiply_block<Math, 2, kWidth>(left, row, b, b_step, finish); break;
      default: multiply_block<Math, 1, kWidth>(left, row, b, b_step, finish); break;
    }
    row += count;
  }
}

// Rows begin..end of the left factor times a panel of `width` columns, a multiple of kLanes: calls
// finish(row, column, sum) for each vector of columns.
template <class Math, class Finish>
FD_HD void multiply_panel(const Left& left, int64_t begin, int64_t end, const float* panel, int64_t width,
                          const Finish& finish) {
  int64_t column = 0;
  const auto shifted = [&](int64_t row, int vector, Vec sum) FD_INLINE { finish(row, column + vector * kLanes, sum); };
  for (; column + kColumns * kLanes <= width; column += kColumns * kLanes) {
    multiply_rows<Math, kColumns>(left, begin, end, panel + column, width, shifted);
  }
#if FD_LANES == 16
  for (; column + 2 * kLanes <= width; column += 2 * kLanes) {
    multiply_rows<Math, 2>(left, begin, end, panel + column, width, shifted);
  }
#endif
  for (; column < width; column += kLanes) multiply_rows<Math, 1>(left, begin, end, panel + column, width, shifted);
}
