// Sums, moments and extremes of group_norm_silu on one instruction set. Included after simd/exp.h.
//
// Memory is read as rows of columns. In channels_last a row is a position and a column a channel; in a contiguous
// tensor the positions of a channel are cut into rows of a few vectors. Columns lie in the lanes, so that sums run down
// the rows and need no sum across lanes before their end.

constexpr int kVectors = FD_LANES == 16 ? 4 : 2;
constexpr int64_t kChunk = 128;    // rows summed in float32 before they go to float64
constexpr int64_t kSampled = 9;    // every 9th row enters the first shift; 9 is coprime to common widths
constexpr int64_t kPartRows = 32;  // rows that are normalised together, so that memory is read in long runs

// kCount vectors of columns; or, if kPartial, the first `lanes` lanes of one vector.
template <int kCount, bool kPartial>
struct Columns {
  static constexpr int kVectorCount = kCount;
  int64_t lanes = kCount * kLanes;

  template <class T>
  FD_HD Vec read(const T* from, int i) const {
    if constexpr (kPartial) return load(from, lanes);
    else return load(from + i * kLanes);
  }

  template <class T>
  FD_HD void write(T* to, int i, Vec value) const {
    if constexpr (kPartial) store(to, value, lanes);
    else store(to + i * kLanes, value);
  }
};

// Divides the columns of a row: calls run(columns, first column) for each group of vectors.
template <class Run>
FD_HD void each_columns(int64_t width, const Run& run) {
  int64_t column = 0;
  for (; column + kVectors * kLanes <= width; column += kVectors * kLanes) run(Columns<kVectors, false>{}, column);
  for (; column + kLanes <= width; column += kLanes) run(Columns<1, false>{}, column);
  if (column < width) run(Columns<1, true>{width - column}, column);
}

// Divides `size` consecutive numbers into rows: calls run(columns, first number, rows, stride) for each shape of row.
template <class Run>
FD_HD void each_rows(int64_t size, const Run& run) {
  constexpr int64_t kWide = kVectors * kLanes;
  const int64_t wide = size / kWide, narrow = size % kWide / kLanes, lanes = size % kLanes;
  if (wide > 0) run(Columns<kVectors, false>{}, int64_t{0}, wide, kWide);
  if (narrow > 0) run(Columns<1, false>{}, wide * kWide, narrow, int64_t{kLanes});
  if (lanes > 0) run(Columns<1, true>{lanes}, size - lanes, int64_t{1}, int64_t{kLanes});
}

// For each column: sums of x - base and of its square, the shift about which the next rows are summed, and, with
// kExtremes, the least and the greatest x, ignoring NaN.
struct ColumnSums {
  double *sum, *squares;
  float *base, *shift, *least, *greatest;
};

// Adds at most kChunk rows, in float32, about a shift: the mean of the rows before or, for the first rows, of a sample
// of them. If the sample's mean is a poor shift then the variance is large too, so cancellation is harmless.
template <bool kExtremes, class T, int kCount, bool kPartial>
void add_rows(Columns<kCount, kPartial> columns, const T* x, int64_t rows, int64_t stride, bool first,
              const ColumnSums& to) {
  Vec shift[kCount] = {};
  if (first) {
    for (int64_t r = 0; r < rows; r += kSampled) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) shift[i] += columns.read(x + r * stride, i);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      shift[i] *= spread(1.0f / static_cast<float>((rows + kSampled - 1) / kSampled));
      columns.write(to.base, i, shift[i]);
    }
    for (int64_t i = 0; i < columns.lanes; ++i) to.sum[i] = to.squares[i] = 0;
  } else {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) shift[i] = columns.read(to.shift, i);
  }
  Vec sum[kCount] = {}, squares[kCount] = {}, least[kCount], greatest[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount && kExtremes; ++i) {
    least[i] = first ? spread(__builtin_inff()) : columns.read(to.least, i);
    greatest[i] = first ? spread(-__builtin_inff()) : columns.read(to.greatest, i);
  }
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const Vec value = columns.read(x + r * stride, i), d = value - shift[i];
      sum[i] += d;
      squares[i] = mul_add(d, d, squares[i]);
      if constexpr (kExtremes) {
        least[i] = value < least[i] ? value : least[i];
        greatest[i] = value > greatest[i] ? value : greatest[i];
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kCount && kExtremes; ++i) {
    columns.write(to.least, i, least[i]);
    columns.write(to.greatest, i, greatest[i]);
  }
  alignas(64) float sums[3][kCount * kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    store(sums[0] + i * kLanes, sum[i]);
    store(sums[1] + i * kLanes, squares[i]);
    store(sums[2] + i * kLanes, shift[i]);
    columns.write(to.shift, i, shift[i] + sum[i] * spread(1.0f / static_cast<float>(rows)));
  }
  const double count = static_cast<double>(rows);
  double* __restrict total = to.sum;
  double* __restrict total_squares = to.squares;
  const float* __restrict base = to.base;
  for (int64_t i = 0; i < columns.lanes; ++i) {
    const double s = sums[0][i], by = static_cast<double>(sums[2][i]) - base[i];
    total[i] += s + count * by;
    total_squares[i] += sums[1][i] + by * (2 * s + count * by);
  }
}

// Merges the moments of many sets of equally many numbers: sums of their means about a shift, and of their m2.
struct EqualMoments {
  double sum = 0, squares = 0, m2 = 0;

  FD_HD void add(double mean, double m2_) {
    sum += mean;
    squares += mean * mean;
    m2 += m2_;
  }

  FD_HD Moments moments(double sets, double count, double shift) const {
    const Moments of_means = shifted_moments(sets, shift, sum, squares);
    return {sets * count, of_means.mean, m2 + count * of_means.m2};
  }
};

// The moments of `size` consecutive numbers.
template <class T>
Moments contiguous_moments(const T* x, int64_t size) {
  Moments result = {0, 0, 0};
  each_rows(size, [&](auto columns, int64_t first, int64_t rows, int64_t stride) FD_INLINE {
    constexpr int kWidth = decltype(columns)::kVectorCount * kLanes;
    double sum[kWidth], squares[kWidth];
    float base[kWidth], shift[kWidth];
    for (int64_t r = 0; r < rows; r += kChunk) {
      add_rows<false>(columns, x + first + r * stride, rows - r < kChunk ? rows - r : kChunk, stride, r == 0,
                      ColumnSums{sum, squares, base, shift, nullptr, nullptr});
    }
    const double count = static_cast<double>(rows), inverse = 1 / count, origin = base[0];
    EqualMoments lanes;
    for (int64_t i = 0; i < columns.lanes; ++i) {
      const double mean = sum[i] * inverse;
      lanes.add(base[i] - origin + mean, squares[i] - sum[i] * mean);
    }
    result = merge(result, lanes.moments(static_cast<double>(columns.lanes), count, origin));
  });
  return result;
}

FD_HD Vec magnitude(Vec x) { return (Vec)((Uint32)x & 0x7FFFFFFFu); }

// The largest |silu(z)| for all z between two ends, given u = -z * log2(e) at both; NaN where a is.
FD_HD Vec largest_silu(Vec a, Vec b) {
  const Vec ends = max_or_a(magnitude(silu<float>(a)), magnitude(silu<float>(b)));
  const Vec lowest = spread(-kLog2E * kLowestSiluAt);  // u where -silu is largest; it falls on both sides
  const auto between = (a < lowest) != (b < lowest);
  return between ? max_or_a(ends, spread(kLowestSilu)) : ends;
}
