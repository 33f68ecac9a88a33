// Matrix products on one instruction set. Numbers of the left factor are broadcast one by one; columns of the right
// factor lie in the lanes of vectors. Included after simd/vec.h.
//
// The right factor is packed in panels: panel[depth][columns], the rows a given step apart.

typedef float UnalignedFloat __attribute__((aligned(1), may_alias));

// A block of sums is kept in registers: kBlockRows rows by kBlockVectors vectors of columns.
#if FD_LANES == 16
constexpr int kBlockRows = 6, kBlockVectors = 4;  // of 32 registers: 24 sums, 4 vectors of columns, a broadcast
#elif FD_LANES == 8
constexpr int kBlockRows = 6, kBlockVectors = 2;  // of 16 registers: 12 sums, 2 vectors of columns, a broadcast
#else
constexpr int kBlockRows = 4, kBlockVectors = 2;  // of 16 registers
#endif

// ---- Element types of the factors and their multiply-add: kPack numbers of either factor in 32 bits.

// float32; the bits of a sum are the same on every instruction set.
struct Float32Fma {
  static constexpr int kPack = 1;
  static FD_HD Vec multiply_add(Vec c, Vec a, Vec b) { return fma(a, b, c); }
};

// float32, with two roundings on the baseline.
struct Float32 {
  typedef float Element;
  static constexpr int kPack = 1;
  static FD_HD Vec multiply_add(Vec c, Vec a, Vec b) { return mul_add(a, b, c); }

  // kLanes columns of a row of a panel.
  static FD_HD Vec columns(const float* panel, int64_t step, int64_t row, int64_t column) {
    return load(panel + row * step + column);
  }
};

#if FD_BFLOAT16
// Pairs of bfloat16, summed in float32.
struct Bfloat16Pairs {
  typedef BFloat16 Element;
  static constexpr int kPack = 2;
  static FD_HD Vec multiply_add(Vec c, Vec a, Vec b) {
    return (Vec)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }

  // kLanes columns of a row of a panel, as float32.
  static FD_HD Vec columns(const float* panel, int64_t step, int64_t row, int64_t column) {
    const __m512i pairs = _mm512_loadu_si512(panel + row / 2 * step + column);
    return (Vec)(row % 2 == 0 ? _mm512_slli_epi32(pairs, 16) : _mm512_and_si512(pairs, _mm512_set1_epi32(-65536)));
  }
};
#endif

// ---- Left factors, in units of 32 bits: a float, or a pair of bfloat16.

// Row i begins at rows[i]; its numbers are `depth` consecutive numbers behind each of `taps`, which are offsets in
// bytes.
struct GatheredRows {
  static constexpr int64_t step = 4;  // bytes from one number to the next
  const char* const* rows;
  const int64_t* taps;
  int64_t tap_count, depth;

  FD_HD const char* row(int64_t i) const { return rows[i]; }
  FD_HD int64_t tap(int64_t i) const { return taps[i]; }
};

// Rows `row_step` bytes apart, of `depth` numbers `step` bytes apart.
struct StridedRows {
  static constexpr int64_t tap_count = 1;
  const char* data;
  int64_t row_step, step, depth;

  FD_HD const char* row(int64_t i) const { return data + i * row_step; }
  FD_HD int64_t tap(int64_t) const { return 0; }
};

// ---- What is read after a product, and is brought into the cache meanwhile.

struct NothingAhead {
  FD_HD void fetch() {}
};

// The panel at `next`, as large as the one that `rows` rows are multiplied by.
struct PanelAhead {
  const char* next;
  int64_t step;  // bytes for each number of depth

  FD_HD PanelAhead(const float* next, int64_t rows)
      : next(reinterpret_cast<const char*>(next)), step(kBlockVectors * kLanes * 4 / divide_up(rows, kBlockRows)) {}

  FD_HD void fetch() {
    __builtin_prefetch(next, 0, 2);
    next += step;
  }
};

// ---- Products.

// Sums of kCount rows and kWidth vectors of columns, given to finish(row, vector, sum).
template <class Math, int kCount, int kWidth, class Lhs, class Finish, class Ahead>
FD_HD void multiply_block(const Lhs& lhs, int64_t first, const float* b, int64_t b_step, const Finish& finish,
                          Ahead& next) {
  Ahead ahead = next;
  Vec sum[kCount][kWidth] = {};
  const char* rows[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) rows[i] = lhs.row(first + i);
  for (int64_t tap = 0; tap < lhs.tap_count; ++tap) {
    int64_t at = lhs.tap(tap);
    for (int64_t k = 0; k < lhs.depth; ++k, at += lhs.step) {
      ahead.fetch();
      Vec columns[kWidth];
#pragma GCC unroll 8
      for (int j = 0; j < kWidth; ++j) columns[j] = load(b + j * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) {
        const Vec factor = spread(*reinterpret_cast<const UnalignedFloat*>(rows[i] + at));
#pragma GCC unroll 8
        for (int j = 0; j < kWidth; ++j) sum[i][j] = Math::multiply_add(sum[i][j], factor, columns[j]);
      }
      b += b_step;
    }
  }
  next = ahead;
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < kWidth; ++j) finish(first + i, j, sum[i][j]);
  }
}

template <class Math, int kWidth, class Lhs, class Finish, class Ahead>
FD_HD void multiply_rows(const Lhs& lhs, int64_t begin, int64_t end, const float* b, int64_t b_step,
                         const Finish& finish, Ahead& ahead) {
  int64_t blocks = divide_up(end - begin, kBlockRows);
  for (int64_t row = begin; row < end; --blocks) {
    const int64_t count = divide_up(end - row, blocks);  // blocks of equal height, or of two heights that differ by 1
    switch (count) {
#if FD_LANES >= 8
      case 6: multiply_block<Math, 6, kWidth>(lhs, row, b, b_step, finish, ahead); break;
      case 5: multiply_block<Math, 5, kWidth>(lhs, row, b, b_step, finish, ahead); break;
#endif
      case 4: multiply_block<Math, 4, kWidth>(lhs, row, b, b_step, finish, ahead); break;
      case 3: multiply_block<Math, 3, kWidth>(lhs, row, b, b_step, finish, ahead); break;
      case 2: multiply_block<Math, 2, kWidth>(lhs, row, b, b_step, finish, ahead); break;
      default: multiply_block<Math, 1, kWidth>(lhs, row, b, b_step, finish, ahead); break;
    }
    row += count;
  }
}

// Rows begin..end of the left factor times `width` columns of a panel, a multiple of kLanes, whose rows are `step`
// floats apart. Calls finish(row, column, sum) for each vector of columns.
template <class Math, class Lhs, class Finish, class Ahead = NothingAhead>
FD_HD void multiply_panel(const Lhs& lhs, int64_t begin, int64_t end, const float* panel, int64_t step, int64_t width,
                          const Finish& finish, Ahead ahead = {}) {
  int64_t column = 0;
  const auto shifted = [&](int64_t row, int vector, Vec sum) FD_INLINE { finish(row, column + vector * kLanes, sum); };
  for (; column + kBlockVectors * kLanes <= width; column += kBlockVectors * kLanes) {
    multiply_rows<Math, kBlockVectors>(lhs, begin, end, panel + column, step, shifted, ahead);
  }
#if FD_LANES == 16
  if (column + 3 * kLanes <= width) {
    multiply_rows<Math, 3>(lhs, begin, end, panel + column, step, shifted, ahead);
    column += 3 * kLanes;
  } else if (column + 2 * kLanes <= width) {
    multiply_rows<Math, 2>(lhs, begin, end, panel + column, step, shifted, ahead);
    column += 2 * kLanes;
  }
#endif
  for (; column < width; column += kLanes) {
    multiply_rows<Math, 1>(lhs, begin, end, panel + column, step, shifted, ahead);
  }
}
