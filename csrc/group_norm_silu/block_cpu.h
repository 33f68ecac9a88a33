// The block of channels that a thread normalises at a time, on one instruction set: its statistics and affine maps.
// Included after group_norm_silu/statistics_cpu.h.

// Numbers for each channel of a block, in arrays of the block's width.
struct Channels {
  double *mean, *m2, *first, *second;  // first, second: sums
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
  int64_t sample, first_group, groups, width;  // width: channels
  int64_t at;                                  // offset of its first element in x

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
    // Until map_channels, gain and offset hold weight and bias; here slope and intercept begin as scale and shift.
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

  // Calls run(columns, first channel, offset, rows, stride) for each part of the block. In channels_last every column
  // is a channel, and a part has at most `max_rows` rows; otherwise all columns of a part belong to one channel.
  template <class Run>
  FD_HD void each_part(int64_t max_rows, const Run& run) const {
    if (args.channels_last) {
      for (int64_t row = 0; row < args.positions; row += max_rows) {
        const int64_t rows = args.positions - row < max_rows ? args.positions - row : max_rows;
        each_columns(width, [&](auto columns, int64_t column)
                                FD_INLINE { run(columns, column, at + row * args.pixel + column, rows, args.pixel); });
      }
    } else {
      for (int64_t c = 0; c < width; ++c) {
        each_rows(args.positions, [&](auto columns, int64_t first, int64_t rows, int64_t stride)
                                      FD_INLINE { run(columns, c, at + c * args.positions + first, rows, stride); });
      }
    }
  }

  // The values of the columns' channels, as vectors.
  template <class C>
  FD_HD void spread_channels(C columns, const float* values, int64_t c, Vec (&to)[C::kVectorCount]) const {
#pragma GCC unroll 4
    for (int i = 0; i < C::kVectorCount; ++i) {
      to[i] = args.channels_last ? columns.read(values + c, i) : spread(values[c]);
    }
  }

  // The moments of x, without `add`, for each channel.
  FD_HD void channel_moments() const {
    const T* x = static_cast<const T*>(args.x);
    const double inverse = 1 / static_cast<double>(args.positions);
    if (args.channels_last) {
      each_part(kChunk, [&](auto columns, int64_t c, int64_t from, int64_t rows, int64_t stride) FD_INLINE {
        const ColumnSums sums{channel.mean + c, channel.m2 + c,    channel.centre + c,
                              channel.of_x + c, channel.least + c, channel.greatest + c};
        if (args.bounded) add_rows<true>(columns, x + from, rows, stride, from - c == at, sums);
        else add_rows<false>(columns, x + from, rows, stride, from - c == at, sums);
      });
      double* __restrict mean = channel.mean, * __restrict m2 = channel.m2;
      const float* __restrict base = channel.centre;
      for (int64_t c = 0; c < width; ++c) {
        const double by = mean[c] * inverse;
        m2[c] -= mean[c] * by;
        mean[c] = base[c] + by;
      }
    } else {
      for (int64_t c = 0; c < width; ++c) {
        const Moments moments = contiguous_moments(x + at + c * args.positions, args.positions);
        channel.mean[c] = moments.mean;
        channel.m2[c] = moments.m2;
      }
    }
  }

  // Mean and rstd of x + add: for each group in the op's results, and for each channel here.
  FD_HD void group_statistics() const {
    const int64_t size = args.group_size();
    const bool whole = !args.channels_last && args.add.data == nullptr;  // a group is then contiguous, of one mean
    if (!whole) channel_moments();
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * size;
      Moments moments;
      if (whole) {
        const T* x = static_cast<const T*>(args.x) + at + first * args.positions;
        moments = contiguous_moments(x, size * args.positions);
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

  // Bounds of the magnitudes after the activation, for each channel, up to rounding. NaN if the channel's statistics
  // are.
  FD_HD void bound_channels(float* bounds) const {
    for (int64_t c = 0; c < width; c += kLanes) {
      const int64_t lanes = width - c < kLanes ? width - c : kLanes;
      const auto mapped = [&](const float* x) FD_INLINE {  // in the arithmetic of the op that reads the affine map
        return mul_add(load(x + c, lanes) - load(channel.centre + c, lanes), load(channel.gain + c, lanes),
                       load(channel.offset + c, lanes));
      };
      const Vec a = mapped(channel.least), b = mapped(channel.greatest);
      store(bounds + c, args.silu ? largest_silu(a, b) : max_or_a(magnitude(a), magnitude(b)), lanes);
    }
  }

  // Sets the affine maps from x to z * factor.
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
