// The gradient of group_norm_silu on one instruction set. Included after group_norm_silu/block_cpu.h.

// dz, the gradient before the activation, from the gradient after it.
template <bool kSilu, class T>
FD_HD Vec gradient_before(Vec grad, Vec z) {
  if constexpr (!kSilu) return grad;
  Vec u = z * spread(-kLog2E);
#if FD_LANES < 16
  u = u > spread(127.0f) ? spread(127.0f) : u;
#endif
  const Vec sigmoid = spread(1.0f) / (spread(1.0f) + exp2_fast<T>(u));
  return grad * mul_add(sigmoid * z, spread(1.0f) - sigmoid, sigmoid);
}

// Adds the columns' sums to the sums of their channels.
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

// Calls each(d, dz, offset, i, sums) for every vector of a part, where d = x - centre, and adds the sums to the sums of
// the channels.
template <bool kSilu, class T, class C, int kSums, class Each>
void each_gradient(const Block<T>& block, C columns, int64_t c, const T* x, const T* grad, int64_t rows, int64_t stride,
                   double* const (&to)[kSums], const Each& each) {
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
        const Vec z = mul_add(d, gain[i], offset[i]);
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
  block.each_part(kPartRows, [&](auto columns, int64_t c, int64_t at, int64_t rows, int64_t stride) FD_INLINE {
    each_gradient<kSilu>(block, columns, c, x + at, grad + at, rows, stride, sums_of_dz,
                         [](Vec d, Vec dz, int64_t, int i, auto& sums) FD_INLINE {
                           sums[0][i] += dz;
                           sums[1][i] = mul_add(dz, d, sums[1][i]);
                         });
  });
  const double positions = static_cast<double>(args.positions), inverse = 1.0 / static_cast<double>(size);
  for (int64_t first = 0; first < block.width; first += size) {
    double dz_sum = 0, dz_xhat_sum = 0;  // of the group's channels, weighted
    for (int64_t c = first; c < first + size; ++c) {
      const double centre = channel.mean[c] - channel.add[c], residue = centre - static_cast<float>(centre);
      const double dz_xhat = (channel.second[c] - residue * channel.first[c]) * channel.rstd[c];
      gradient.sum_dz[row + c] = static_cast<float>(channel.first[c]);
      gradient.sum_dz_xhat[row + c] = static_cast<float>(dz_xhat);
      channel.first[c] *= channel.slope[c];
      channel.m2[c] = residue * positions;
      dz_sum += channel.first[c];
      dz_xhat_sum += channel.slope[c] * dz_xhat;
    }
    dz_sum *= inverse;
    const double dz_mean = dz_sum / positions, dz_xhat_mean = dz_xhat_sum * inverse / positions;
    for (int64_t c = first; c < first + size; ++c) {
      const GradientMap map =
          gradient_map(channel.mean[c] - channel.add[c], channel.rstd[c], channel.slope[c], dz_mean, dz_xhat_mean);
      channel.of_dz[c] = map.of_dz;
      channel.of_x[c] = map.of_x;
      channel.constant[c] = map.constant;
      channel.mean[c] = dz_xhat_mean;
      channel.first[c] -= dz_sum;
      channel.second[c] = -channel.m2[c];  // from here on, the sum of x less its mean
    }
  }
  double* const sums_of_x[] = {channel.second};
  block.each_part(kPartRows, [&](auto columns, int64_t c, int64_t at, int64_t rows, int64_t stride) FD_INLINE {
    constexpr int kCount = decltype(columns)::kVectorCount;
    Vec of_dz[kCount], of_x[kCount], constant[kCount];
    block.spread_channels(columns, channel.of_dz, c, of_dz);
    block.spread_channels(columns, channel.of_x, c, of_x);
    block.spread_channels(columns, channel.constant, c, constant);
    each_gradient<kSilu>(block, columns, c, x + at, grad + at, rows, stride, sums_of_x,
                         [&](Vec d, Vec dz, int64_t row, int i, auto& sums) FD_INLINE {
                           columns.write(dx + at + row, i, mul_add(dz, of_dz[i], mul_add(d, of_x[i], constant[i])));
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
