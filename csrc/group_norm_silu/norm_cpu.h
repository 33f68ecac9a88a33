// group_norm_silu on one instruction set. group_norm_silu/group_norm_silu.cpp includes this file once for each, after simd/vec.h
// in the same namespace.
//
// Memory is read as rows of columns: in channels_last a row is a position and a column a channel; in a
// contiguous tensor the positions of one channel are cut into rows as wide as some vectors. Columns lie in the
// lanes, so that sums run down the rows and need no sum across lanes before their end.

constexpr int kVectors = FD_LANES == 16 ? 4 : 2;
constexpr int64_t kChunk = 128;     // rows summed in float32 before they go to float64
constexpr int64_t kSampled = 9;     // one of so many rows enters the first shift: few images are so wide
constexpr int64_t kTileRows = 32;   // rows that are mapped together, so that neighbours in memory stay neighbours

// kCount vectors of columns, or only the first `lanes` lanes of one vector.
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

template <class Run>
FD_HD void each_columns(int64_t width, const Run& run) {
  int64_t column = 0;
  for (; column + kVectors * kLanes <= width; column += kVectors * kLanes) run(Columns<kVectors, false>{}, column);
  for (; column + kLanes <= width; column += kLanes) run(Columns<1, false>{}, column);
  if (column < width) run(Columns<1, true>{width - column}, column);
}

// Calls run(columns, first, rows, stride) for the parts of a stretch of `size` neighbours.
template <class Run>
FD_HD void each_rows(int64_t size, const Run& run) {
  constexpr int64_t kWide = kVectors * kLanes;
  const int64_t wide = size / kWide, narrow = size % kWide / kLanes, lanes = size % kLanes;
  if (wide > 0) run(Columns<kVectors, false>{}, int64_t{0}, wide, kWide);
  if (narrow > 0) run(Columns<1, false>{}, wide * kWide, narrow, int64_t{kLanes});
  if (lanes > 0) run(Columns<1, true>{lanes}, size - lanes, int64_t{1}, int64_t{kLanes});
}

// ---- Statistics.

// For each column: sums of x - base and of its square, the shift about which its next rows are summed, and, if wanted,
// the least and the greatest x, NaN left aside.
struct ColumnSums {
  double *sum, *squares;
  float *base, *shift, *least, *greatest;
};

// Adds at most kChunk rows, in float32, about the mean of the rows before, or, if these are the first, of a sample
// of them: whatever that is far from also spreads the whole column, so no digits are lost.
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
      squares[i] = fma(d, d, squares[i]);
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

// The moments of many sets of numbers of one count, kept as sums of their means about a shift, and of m2.
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

// The moments of `size` neighbours.
template <class T>
Moments stretch_moments(const T* x, int64_t size) {
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

FD_HD Vec magnitude(Vec x) { return (Vec)((Unsigned)x & 0x7FFFFFFFu); }

FD_HD Vec larger(Vec a, Vec b) { return a < b ? b : a; }  // NaN where a is

// The largest |silu(z)| for z from one end to the other, of u = -z * log2(e) at both.
FD_HD Vec largest_silu(Vec a, Vec b) {
  const Vec ends = larger(magnitude(silu<float>(a)), magnitude(silu<float>(b)));
  const Vec lowest = spread(-kLog2E * kLowestSiluAt);  // u where -silu is largest, and falls on both sides
  const auto between = (a < lowest) != (b < lowest);
  return between ? larger(ends, spread(kLowestSilu)) : ends;
}

// ---- A block: some whole groups of one sample, which stay in the cache between the passes.

// What is kept for each channel of a block, in arrays of the block's width.
struct Channels {
  double *mean, *m2, *first, *second;  // the last two: sums
  float *add, *slope, *intercept, *rstd, *centre, *gain, *offset, *of_dz, *of_x, *constant, *least, *greatest;

  // scratch: kChannelDoubles for each channel.
  FD_HD Channels(double* scratch, int64_t width) {
    double** const doubles[] = {&mean, &m2, &first, &second};
    float** const floats[] = {&add,    &slope, &intercept, &rstd,     &centre, &gain,
                              &offset, &of_dz, &of_x,      &constant, &least,  &greatest};
    for (double** array : doubles) *array = scratch, scratch += width;
    float* next = reinterpret_cast<float*>(scratch);
    for (float** array : floats) *array = next, next += width;
  }
};

void read_parameter(const Parameter& parameter, int64_t n, int64_t first, int64_t count, float* to) {
  parameter.copy(n, first, count, to);
}

template <class T>
struct Block {
  const NormArguments& args;
  Channels channel;
  int64_t sample, first_group, groups, width, at;  // at: where its first element lies

  // Number `index` of the blocks of `groups_at_most` groups.
  FD_HD Block(const NormArguments& arguments, int64_t groups_at_most, double* scratch, int64_t index)
      : args(arguments), channel(scratch, groups_at_most * arguments.group_size()) {
    const int64_t blocks = (args.groups + groups_at_most - 1) / groups_at_most;
    sample = index / blocks;
    first_group = index % blocks * groups_at_most;
    groups = args.groups - first_group < groups_at_most ? args.groups - first_group : groups_at_most;
    width = groups * args.group_size();
    at = sample * (args.channels_last ? args.pixel : args.channels) * args.positions +
         first_channel() * (args.channels_last ? 1 : args.positions);
  }

  FD_HD int64_t first_channel() const { return first_group * args.group_size(); }

  FD_HD void read_parameters() const {
    const int64_t n = sample, c = first_channel();
    read_parameter(args.add, n, c, width, channel.add);
    // Not yet needed: gain and offset hold weight and bias, slope and intercept scale and shift.
    read_parameter(args.weight, n, c, width, channel.gain);
    read_parameter(args.bias, n, c, width, channel.offset);
    read_parameter(args.scale, n, c, width, channel.slope);
    read_parameter(args.shift, n, c, width, channel.intercept);
    for (int64_t i = 0; i < width; ++i) {
      const float scale = 1.0f + channel.slope[i];
      channel.slope[i] = channel.gain[i] * scale;
      channel.intercept[i] = channel.offset[i] * scale + channel.intercept[i];
    }
  }

  // Calls run(columns, first channel, offset, rows, stride): in each, either every column is a channel or all
  // columns belong to one. In channels_last there are at most `tile` rows to a part.
  template <class Run>
  FD_HD void each_part(int64_t tile, const Run& run) const {
    if (args.channels_last) {
      for (int64_t row = 0; row < args.positions; row += tile) {
        const int64_t rows = args.positions - row < tile ? args.positions - row : tile;
        each_columns(width, [&](auto columns, int64_t column) FD_INLINE {
          run(columns, column, at + row * args.pixel + column, rows, args.pixel);
        });
      }
    } else {
      for (int64_t c = 0; c < width; ++c) {
        each_rows(args.positions, [&](auto columns, int64_t first, int64_t rows, int64_t stride) FD_INLINE {
          run(columns, c, at + c * args.positions + first, rows, stride);
        });
      }
    }
  }

  // A value of each channel as a vector for each of the columns.
  template <class C>
  FD_HD void spread_channels(C columns, const float* values, int64_t c, Vec (&to)[C::kVectorCount]) const {
#pragma GCC unroll 4
    for (int i = 0; i < C::kVectorCount; ++i) {
      to[i] = args.channels_last ? columns.read(values + c, i) : spread(values[c]);
    }
  }

  // Moments of x, without `add`, for each channel.
  FD_HD void channel_moments() const {
    const T* x = static_cast<const T*>(args.x);
    const double inverse = 1 / static_cast<double>(args.positions);
    if (args.channels_last) {
      each_part(kChunk, [&](auto columns, int64_t c, int64_t from, int64_t rows, int64_t stride) FD_INLINE {
        const ColumnSums sums{channel.mean + c, channel.m2 + c, channel.centre + c,
                              channel.of_x + c, channel.least + c, channel.greatest + c};
        if (args.bounded) add_rows<true>(columns, x + from, rows, stride, from - c == at, sums);
        else add_rows<false>(columns, x + from, rows, stride, from - c == at, sums);
      });
      double *__restrict mean = channel.mean, *__restrict m2 = channel.m2;
      const float* __restrict base = channel.centre;
      for (int64_t c = 0; c < width; ++c) {
        const double by = mean[c] * inverse;
        m2[c] -= mean[c] * by;
        mean[c] = base[c] + by;
      }
    } else {
      for (int64_t c = 0; c < width; ++c) {
        const Moments moments = stretch_moments(x + at + c * args.positions, args.positions);
        channel.mean[c] = moments.mean;
        channel.m2[c] = moments.m2;
      }
    }
  }

  // Mean and rstd of x + add, for each group in the op's results and for each channel here.
  FD_HD void group_statistics() const {
    const int64_t size = args.group_size();
    const bool whole = !args.channels_last && args.add.data == nullptr;  // a group is then one stretch
    if (!whole) channel_moments();
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * size;
      Moments moments;
      if (whole) {
        const T* x = static_cast<const T*>(args.x) + at + first * args.positions;
        moments = stretch_moments(x, size * args.positions);
      } else {
        EqualMoments equal;
        const double shift = channel.mean[first] + channel.add[first];
        for (int64_t c = first; c < first + size; ++c) {
          equal.add(channel.mean[c] + channel.add[c] - shift, channel.m2[c]);
        }
        moments = equal.moments(static_cast<double>(size), static_cast<double>(args.positions), shift);
      }
      const double variance = moments.m2 / moments.count;
      const float rstd = static_cast<float>(1 / __builtin_sqrt((variance < 0 ? 0 : variance) + args.eps));
      const int64_t row = sample * args.groups + first_group + g;
      if (args.mean != nullptr) {
        args.mean[row] = moments.mean;
        args.rstd[row] = rstd;
      }
      spread_statistics(first, moments.mean, rstd);
    }
  }

  FD_HD void spread_statistics(int64_t first, double mean, float rstd) const {
    for (int64_t c = first; c < first + args.group_size(); ++c) {
      channel.mean[c] = mean;
      channel.rstd[c] = rstd;
    }
  }

  // What each channel's magnitudes do not exceed after the activation, but for rounding; NaN if its map is.
  FD_HD void bound_channels(float* bounds) const {
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t lanes = width - c < kLanes ? width - c : kLanes;
      const auto mapped = [&](const float* x) FD_INLINE {  // as the op maps them that reads the map
        return fma(load(x + c, lanes) - load(channel.centre + c, lanes), load(channel.gain + c, lanes),
                   load(channel.offset + c, lanes));
      };
      const Vec a = mapped(channel.least), b = mapped(channel.greatest);
      store(bounds + c, args.silu ? largest_silu(a, b) : larger(magnitude(a), magnitude(b)), lanes);
    }
  }

  // Maps x to z * factor.
  FD_HD void map_channels(float factor) const {
    for (int64_t c = 0; c < width; ++c) {
      const ChannelMap map = channel_map(channel.mean[c], channel.add[c], channel.rstd[c], channel.slope[c] * factor,
                                         channel.intercept[c] * factor);
      channel.centre[c] = map.centre;
      channel.gain[c] = map.gain;
      channel.offset[c] = map.offset;
    }
  }
};

// ---- The forward pass.

// ahead: how far behind x the next block lies, which memory can fetch in the meantime.
template <bool kSilu, class T, class C>
void normalise(const Block<T>& block, C columns, int64_t c, const T* x, T* y, int64_t rows, int64_t stride,
               int64_t ahead) {
  constexpr int kCount = C::kVectorCount, kLine = 64 / static_cast<int>(sizeof(T));
  constexpr int kStep = kLine > kLanes ? kLine / kLanes : 1;  // vectors to a cache line
  Vec centre[kCount], gain[kCount], offset[kCount];
  block.spread_channels(columns, block.channel.centre, c, centre);
  block.spread_channels(columns, block.channel.gain, c, gain);
  block.spread_channels(columns, block.channel.offset, c, offset);
  for (int64_t r = 0; r < rows; ++r, x += stride, y += stride) {
    for (int i = 0; i < kCount; i += kStep) __builtin_prefetch(x + ahead + i * kLanes, 0, 2);
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const Vec z = fma(columns.read(x, i) - centre[i], gain[i], offset[i]);
      columns.write(y, i, kSilu ? silu<T>(z) : z);
    }
  }
}

template <class T>
void forward(const NormArguments& args, void* y, int64_t groups, double* scratch, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(args.x);
  T* to = static_cast<T*>(y);
  for (int64_t i = begin; i < end; ++i) {
    const Block<T> block(args, groups, scratch, i);
    block.read_parameters();
    block.group_statistics();
    block.map_channels(args.silu ? -kLog2E : 1.0f);
    const int64_t ahead = i + 1 < end ? Block<T>(args, groups, scratch, i + 1).at - block.at : 0;
    block.each_part(kTileRows, [&](auto columns, int64_t c, int64_t at, int64_t rows, int64_t stride) FD_INLINE {
      if (args.silu) {
        normalise<true>(block, columns, c, x + at, to + at, rows, stride, ahead);
      } else {
        normalise<false>(block, columns, c, x + at, to + at, rows, stride, ahead);
      }
    });
  }
}

// The maps alone, [3, N, C], or with bounds [4, N, C]: centre, gain and offset of what goes into the activation, gain and
// offset times -log2(e) where that is SiLU.
template <class T>
void maps(const NormArguments& args, float* to, int64_t groups, double* scratch, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Block<T> block(args, groups, scratch, i);
    block.read_parameters();
    block.group_statistics();
    block.map_channels(args.silu ? -kLog2E : 1.0f);
    const int64_t step = args.samples * args.channels, at = block.sample * args.channels + block.first_channel();
    for (int64_t c = 0; c < block.width; ++c) {
      to[at + c] = block.channel.centre[c];
      to[at + c + step] = block.channel.gain[c];
      to[at + c + 2 * step] = block.channel.offset[c];
    }
    if (args.bounded) block.bound_channels(to + at + 3 * step);
  }
}

// ---- The backward pass.

// dz, the gradient before the activation, from that after it.
template <bool kSilu, class T>
FD_HD Vec gradient_before(Vec grad, Vec z) {
  if constexpr (!kSilu) return grad;
  Vec u = z * spread(-kLog2E);
#if FD_LANES < 16
  u = u > spread(127.0f) ? spread(127.0f) : u;
#endif
  const Vec sigmoid = spread(1.0f) / (spread(1.0f) + power_of_two<T>(u));
  return grad * fma(sigmoid * z, spread(1.0f) - sigmoid, sigmoid);
}

// Adds the columns' sums to those of their channels.
template <class C>
void add_columns(C columns, const Vec (&sums)[C::kVectorCount], bool channels_last, double* to) {
  alignas(64) float lanes[C::kVectorCount * kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < C::kVectorCount; ++i) store(lanes + i * kLanes, sums[i]);
  if (channels_last) {
    for (int64_t i = 0; i < columns.lanes; ++i) to[i] += lanes[i];
  } else {
    for (int64_t i = columns.lanes; i < C::kVectorCount * kLanes; ++i) lanes[i] = 0;
    for (int half = C::kVectorCount * kLanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    *to += lanes[0];
  }
}

// Calls each(d, dz, element, i, sums) for every vector of a part, where d is x less its channel's centre, and adds
// the sums to those of the channels.
template <bool kSilu, class T, class C, int kSums, class Each>
void each_gradient(const Block<T>& block, C columns, int64_t c, const T* x, const T* grad, int64_t rows,
                   int64_t stride, double* const (&to)[kSums], const Each& each) {
  constexpr int kCount = C::kVectorCount;
  Vec centre[kCount], gain[kCount], offset[kCount];
  block.spread_channels(columns, block.channel.centre, c, centre);
  block.spread_channels(columns, block.channel.gain, c, gain);
  block.spread_channels(columns, block.channel.offset, c, offset);
  for (int64_t done = 0; done < rows; done += kChunk) {
    const int64_t end = rows - done < kChunk ? rows : done + kChunk;
    Vec sums[kSums][kCount] = {};
    for (int64_t row = done * stride; row < end * stride; row += stride) {
#pragma GCC unroll 4
      for (int i = 0; i < kCount; ++i) {
        const Vec d = columns.read(x + row, i) - centre[i];
        const Vec z = fma(d, gain[i], offset[i]);
        each(d, gradient_before<kSilu, T>(columns.read(grad + row, i), z), row, i, sums);
      }
    }
    for (int k = 0; k < kSums; ++k) add_columns(columns, sums[k], block.args.channels_last, to[k] + c);
  }
}

template <bool kSilu, class T>
void gradient_block(const Block<T>& block, const NormGradient& gradient) {
  const NormArguments& args = block.args;
  const Channels& channel = block.channel;
  const T* x = static_cast<const T*>(args.x);
  const T* grad = static_cast<const T*>(gradient.grad);
  T* dx = static_cast<T*>(gradient.dx);
  const int64_t size = args.group_size(), row = block.sample * args.channels + block.first_channel();
  for (int64_t c = 0; c < block.width; ++c) channel.first[c] = channel.second[c] = 0;
  double* const sums_of_dz[] = {channel.first, channel.second};
  block.each_part(kTileRows, [&](auto columns, int64_t c, int64_t at, int64_t rows, int64_t stride) FD_INLINE {
    each_gradient<kSilu>(block, columns, c, x + at, grad + at, rows, stride, sums_of_dz,
                         [](Vec d, Vec dz, int64_t, int i, auto& sums) FD_INLINE {
                           sums[0][i] += dz;
                           sums[1][i] = fma(dz, d, sums[1][i]);
                         });
  });
  const double positions = static_cast<double>(args.positions), inverse = 1.0 / static_cast<double>(size);
  for (int64_t first = 0; first < block.width; first += size) {
    double dz_sum = 0, dz_xhat_sum = 0;  // of the group's channels, weighted
    for (int64_t c = first; c < first + size; ++c) {
      const double centre = channel.mean[c] - channel.add[c], left = centre - static_cast<float>(centre);
      const double dz_xhat = (channel.second[c] - left * channel.first[c]) * channel.rstd[c];
      gradient.sum_dz[row + c] = static_cast<float>(channel.first[c]);
      gradient.sum_dz_xhat[row + c] = static_cast<float>(dz_xhat);
      channel.first[c] *= channel.slope[c];
      channel.m2[c] = left * positions;
      dz_sum += channel.first[c];
      dz_xhat_sum += channel.slope[c] * dz_xhat;
    }
    dz_sum *= inverse;
    const double dz_mean = dz_sum / positions, dz_xhat_mean = dz_xhat_sum * inverse / positions;
    for (int64_t c = first; c < first + size; ++c) {
      const GradientMap map = gradient_map(channel.mean[c] - channel.add[c], channel.rstd[c], channel.slope[c],
                                           dz_mean, dz_xhat_mean);
      channel.of_dz[c] = map.of_dz;
      channel.of_x[c] = map.of_x;
      channel.constant[c] = map.constant;
      channel.mean[c] = dz_xhat_mean;
      channel.first[c] -= dz_sum;
      channel.second[c] = -channel.m2[c];  // and from now on the sum of x less its mean
    }
  }
  double* const sums_of_x[] = {channel.second};
  block.each_part(kTileRows, [&](auto columns, int64_t c, int64_t at, int64_t rows, int64_t stride) FD_INLINE {
    constexpr int kCount = decltype(columns)::kVectorCount;
    Vec of_dz[kCount], of_x[kCount], constant[kCount];
    block.spread_channels(columns, channel.of_dz, c, of_dz);
    block.spread_channels(columns, channel.of_x, c, of_x);
    block.spread_channels(columns, channel.constant, c, constant);
    each_gradient<kSilu>(block, columns, c, x + at, grad + at, rows, stride, sums_of_x,
                         [&](Vec d, Vec dz, int64_t row, int i, auto& sums) FD_INLINE {
                           columns.write(dx + at + row, i, fma(dz, of_dz[i], fma(d, of_x[i], constant[i])));
                           sums[0][i] += d;
                         });
  });
  for (int64_t first = 0; first < block.width; first += size) {
    double sum = 0;
    for (int64_t c = first; c < first + size; ++c) sum += channel.second[c];
    sum *= inverse;
    for (int64_t c = first; c < first + size; ++c) {
      gradient.sum_dx[row + c] = sum_of_dx(channel.rstd[c], channel.first[c], channel.second[c] - sum, channel.mean[c]);
    }
  }
}

template <class T>
void backward(const NormArguments& args, const NormGradient& gradient, int64_t groups, double* scratch, int64_t begin,
              int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Block<T> block(args, groups, scratch, i);
    block.read_parameters();
    for (int64_t g = 0; g < block.groups; ++g) {
      const int64_t row = block.sample * args.groups + block.first_group + g;
      block.spread_statistics(g * args.group_size(), args.mean[row], args.rstd[row]);
    }
    block.map_channels(1.0f);
    if (args.silu) {
      gradient_block<true>(block, gradient);
    } else {
      gradient_block<false>(block, gradient);
    }
  }
}

#undef FD_LANES
#undef FD_BFLOAT16
