// Winograd's convolution on one instruction set (Lavin & Gray 2016, arXiv:1509.09308): inputs are transformed to
// frequencies, multiplied by transformed weights at each frequency, and transformed back. Included after
// convolution/pixels_cpu.h and simd/gemm.h.

// Copies kLanes channels of `rows` rows from `first` on, as [rows][columns][kLanes]. Rows may lie outside of the image,
// which begins at column 1; pixels outside of it are 0.
template <Transform kTransform, class T>
void fill_plane(const Convolution& g, int64_t image, int64_t channel, int64_t first, int64_t rows, int64_t columns,
                float* to) {
  const InputReader reader(g, image, channel);
  const T* x = static_cast<const T*>(g.x) + channel;
  for (int64_t row = first; row < first + rows; ++row, to += columns * kLanes) {
    if (row < 0 || row >= g.in_height()) {
      memset(to, 0, columns * kLanes * sizeof(float));
      continue;
    }
    if (g.scale == 2 && row % 2 == 1 && row > first) {
      memcpy(to, to - columns * kLanes, columns * kLanes * sizeof(float));
      continue;
    }
    const T* from = x + (image * g.height + row / g.scale) * g.width * g.x_pixel;
    store(to, Vec{});
    float* next = to + kLanes;
    for (int64_t column = 0; column < g.width; ++column, from += g.x_pixel) {
      const Vec value = reader.template read<kTransform>(from);
      store(next, value);
      next += kLanes;
      if (g.scale == 2) {
        store(next, value);
        next += kLanes;
      }
    }
    memset(next, 0, (to + columns * kLanes - next) * sizeof(float));
  }
}

// ---- The transforms of a row or column of vectors, for outputs of kTile x kTile pixels.

// F(4 x 4, 3 x 3) interpolates at 0, kNear, -kNear, kFar, -kFar and infinity. The usual points 1 and 2 lose twice as
// much to rounding. The powers below are exact in float32.
constexpr float kNear = 5.0f / 8, kNear2 = kNear * kNear, kNear3 = kNear2 * kNear;
constexpr float kFar = 3.0f / 2, kFar2 = kFar * kFar, kFar3 = kFar2 * kFar;

template <int kTile>
FD_HD void transform_inputs(const Vec (&d)[kTile + 2], Vec (&t)[kTile + 2]) {
  if constexpr (kTile == 2) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  } else {
    const Vec near = spread(kNear), near2 = spread(-kNear2), far = spread(kFar), far2 = spread(-kFar2);
    const Vec sum = spread(-(kNear2 + kFar2)), product = spread(kNear2 * kFar2);
    const Vec a = mul_add(far2, d[2], d[4]), b = mul_add(far2, d[1], d[3]) * near;
    const Vec c = mul_add(near2, d[2], d[4]), e = mul_add(near2, d[1], d[3]) * far;
    t[0] = mul_add(product, d[0], mul_add(sum, d[2], d[4]));
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = mul_add(product, d[1], mul_add(sum, d[3], d[5]));
  }
}

template <int kTile>
FD_HD void transform_outputs(const Vec (&m)[kTile + 2], Vec (&y)[kTile]) {
  if constexpr (kTile == 2) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  } else {
    const Vec s = m[1] + m[2], d = m[1] - m[2], u = m[3] + m[4], v = m[3] - m[4];
    y[0] = m[0] + s + u;
    y[1] = mul_add(spread(kFar), v, d * spread(kNear));
    y[2] = mul_add(spread(kFar2), u, s * spread(kNear2));
    y[3] = mul_add(spread(kFar3), v, mul_add(spread(kNear3), d, m[5]));
  }
}

// Transforms a tile of kRows x kRows vectors, whose rows are `columns` vectors apart, to kSize x kSize at `to`,
// `step` elements apart. transform(const Vec (&)[kRows], Vec (&)[kSize]): of a row or column.
template <int kRows, int kSize, class Element, class Of>
FD_HD void transform_square(const float* plane, int64_t columns, Element* to, int64_t step, const Of& transform) {
  Vec halfway[kSize][kRows];
#pragma GCC unroll 6
  for (int j = 0; j < kRows; ++j) {
    Vec d[kRows], t[kSize];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) d[i] = load(plane + (i * columns + j) * kLanes);
    transform(d, t);
#pragma GCC unroll 6
    for (int i = 0; i < kSize; ++i) halfway[i][j] = t[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kSize; ++i) {
    Vec t[kSize];
    transform(halfway[i], t);
#pragma GCC unroll 6
    for (int j = 0; j < kSize; ++j) store(to + (i * kSize + j) * step, t[j]);
  }
}

// Transforms one tile of inputs: [frequency] at `to`, `step` elements apart.
template <int kTile, class Element>
FD_HD void transform_tile(const float* plane, int64_t columns, Element* to, int64_t step) {
  transform_square<kTile + 2, kTile + 2>(plane, columns, to, step,
                                         [](const Vec(&d)[kTile + 2], Vec(&t)[kTile + 2])
                                             FD_INLINE { transform_inputs<kTile>(d, t); });
}

// The strips of an image that a block has: the first of them, counted in the image, how many, and the block's tile with
// which they begin.
struct ImageStrips {
  int64_t from, count, tile;

  FD_HD ImageStrips(const WinogradBlock& block, int64_t image) {
    const int64_t start = image * block.high;
    from = block.first > start ? block.first - start : 0;
    const int64_t last = block.first + block.strips - start;
    count = (last < block.high ? last : block.high) - from;
    tile = (start + from - block.first) * block.wide;
  }
};

template <Transform kTransform, int kTile, class T, class Math>
void transform_planes(const Convolution& g, const WinogradBlock& block, float* v, float* plane, int64_t begin,
                      int64_t end) {
  typedef typename Math::Element Element;
  const int64_t columns = block.wide * kTile + 2, lines = round_up(g.channels, kPackedLanes) / kPackedLanes;
  const int64_t plane_size = block.plane_rows() * columns * kLanes;
  Element* to = reinterpret_cast<Element*>(v);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t first_channel = item % lines * kPackedLanes;
    const int64_t image = block.first / block.high + item / lines;
    const ImageStrips strips(block, image);
    for (int64_t i = 0; i < kPackedLanes / kLanes; ++i) {
      fill_plane<kTransform, T>(g, image, first_channel + i * kLanes, strips.from * kTile - 1, strips.count * kTile + 2,
                                columns, plane + i * plane_size);
    }
    int64_t tile = strips.tile;
    for (int64_t strip = 0; strip < strips.count; ++strip) {
      for (int64_t i = 0; i < block.wide; ++i, ++tile) {
        for (int64_t j = 0; j < kPackedLanes / kLanes; ++j) {
          transform_tile<kTile>(plane + j * plane_size + (strip * columns + i) * kTile * kLanes, columns,
                                to + tile * block.inputs * Math::kPack + first_channel + j * kLanes,
                                block.input_step * Math::kPack);
        }
      }
    }
  }
}

// Items: kPackedLanes channels, so that whole lines of v are written at a time, of the images that the block has a part
// of. v: [frequency][tile][channel]; plane: scratch for those channels.
template <class T, class Math>
void winograd_input(const Convolution& g, const WinogradBlock& block, float* v, float* plane, int64_t begin,
                    int64_t end) {
  const auto run = [&](auto transform) FD_INLINE {
    if (block.size == 2) transform_planes<decltype(transform)::value, 2, T, Math>(g, block, v, plane, begin, end);
    else transform_planes<decltype(transform)::value, 4, T, Math>(g, block, v, plane, begin, end);
  };
  switch (transform_of(g)) {
    case Transform::plain: return run(std::integral_constant<Transform, Transform::plain>{});
    case Transform::normalised: return run(std::integral_constant<Transform, Transform::normalised>{});
    case Transform::activated: return run(std::integral_constant<Transform, Transform::activated>{});
  }
}

// AVX-512's wide panels are left to the processor.
constexpr bool kReadsAhead = FD_LANES < 16;

// Items: panels of weights of all frequencies. m: [frequency][tile][output channel]. While the last rows are multiplied
// by a panel, the next is read: with few tiles, reading the weights takes as long as the products.
template <class Math>
void winograd_multiply(const Convolution& g, const WinogradBlock& block, const float* v, float* m, int64_t begin,
                       int64_t end) {
  const int64_t panels = g.panels(), depth = (g.channels + Math::kPack - 1) / Math::kPack, no_offset = 0;
  const char* rows[kMaxRows];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t frequency = item / panels, panel = item % panels, width = g.panel_width(panel);
    const float* weight = g.weight + (frequency * block.outputs + panel * kPanel) * depth;
    const int64_t step = width < g.panel ? width : g.panel;
    for (int64_t first = 0; first < block.count(); first += kMaxRows) {
      const int64_t count = block.count() - first < kMaxRows ? block.count() - first : kMaxRows;
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = reinterpret_cast<const char*>(v + frequency * block.input_step + (first + i) * block.inputs);
      }
      for (int64_t begin_column = 0; begin_column < width; begin_column += step) {
        float* to = m + frequency * block.output_step + first * block.outputs + panel * kPanel + begin_column;
        const float* from = weight + begin_column * depth;
        const auto multiply = [&](auto ahead) FD_INLINE {
          multiply_panel<Math>(
              GatheredRows{rows, &no_offset, 1, depth}, 0, count, from, step, step,
              [&](int64_t row, int64_t column, Vec sum) FD_INLINE { store(to + row * block.outputs + column, sum); },
              ahead);
        };
        if constexpr (kReadsAhead) {
          if (first + count == block.count()) {
            multiply(PanelAhead(from + step * depth, count));
            continue;
          }
        }
        multiply(NothingAhead{});
      }
    }
  }
}

// Recovers the three taps of a filter's row or column from their transform to frequencies.
template <int kTile>
FD_HD void recover_taps(const Vec (&u)[kTile + 2], Vec (&w)[3]) {
  if constexpr (kTile == 2) {
    w[0] = u[0];
    w[1] = u[1] - u[2];
    w[2] = u[3];
  } else {
    w[0] = u[0] * spread(kNear2 * kFar2);
    w[1] = (u[2] - u[1]) * spread(kNear * (kFar2 - kNear2));
    w[2] = u[5];
  }
}

// Copies the pixels that a tile reads, kLanes channels of each; pixels outside of the image are 0.
template <int kTile, Transform kTransform, class T>
void read_patch(const Convolution& g, int64_t image, int64_t channel, int64_t top, int64_t first_column,
                float (&patch)[(kTile + 2) * (kTile + 2)][kLanes]) {
  const InputReader reader(g, image, channel);
  for (int i = 0; i < (kTile + 2) * (kTile + 2); ++i) {
    const int64_t row = top + i / (kTile + 2) - 1, column = first_column + i % (kTile + 2) - 1;
    const bool inside = row >= 0 && row < g.in_height() && column >= 0 && column < g.in_width();
    const int64_t at = ((image * g.height + row / g.scale) * g.width + column / g.scale) * g.x_pixel;
    store(patch[i], inside ? reader.template read<kTransform>(static_cast<const T*>(g.x) + at + channel) : Vec{});
  }
}

// Computes kLanes output channels of a tile by the direct convolution. Winograd's sums are differences of numbers up to
// twenty times as large as the inputs: for inputs near the largest float32 they are infinite where the outputs are
// not, and a NaN or infinity among the inputs reaches all outputs of the tile.
template <int kTile, class T, class Math>
__attribute__((noinline)) void sum_directly(const Convolution& g, const WinogradBlock& block, int64_t image,
                                            int64_t top, int64_t first_column, int64_t out_channel,
                                            Vec (&y)[kTile][kTile]) {
  constexpr int kSize = kTile + 2;
  const int64_t first = out_channel / g.panel * g.panel, column = out_channel - first;
  const int64_t remaining = block.outputs - first, width = remaining < g.panel ? remaining : g.panel;
  const int64_t depth = (g.channels + Math::kPack - 1) / Math::kPack;
  alignas(64) float patch[kSize * kSize][kLanes];
  for (int i = 0; i < kTile * kTile; ++i) y[i / kTile][i % kTile] = Vec{};
  for (int64_t channel = 0; channel < g.channels; ++channel) {
    const int64_t lane = channel % kLanes;
    if (lane == 0) {
      switch (transform_of(g)) {
        case Transform::plain:
          read_patch<kTile, Transform::plain, T>(g, image, channel, top, first_column, patch);
          break;
        case Transform::normalised:
          read_patch<kTile, Transform::normalised, T>(g, image, channel, top, first_column, patch);
          break;
        case Transform::activated:
          read_patch<kTile, Transform::activated, T>(g, image, channel, top, first_column, patch);
          break;
      }
    }
    Vec halfway[kSize][3], w[3][3];
    for (int i = 0; i < kSize; ++i) {
      Vec u[kSize];
      for (int j = 0; j < kSize; ++j) {
        u[j] = Math::columns(g.weight + ((i * kSize + j) * block.outputs + first) * depth, width, channel, column);
      }
      recover_taps<kTile>(u, halfway[i]);
    }
    for (int b = 0; b < 3; ++b) {
      Vec u[kSize], taps[3];
      for (int i = 0; i < kSize; ++i) u[i] = halfway[i][b];
      recover_taps<kTile>(u, taps);
      for (int a = 0; a < 3; ++a) w[a][b] = taps[a];
    }
    for (int i = 0; i < kTile * kTile; ++i) {
      Vec& sum = y[i / kTile][i % kTile];
      for (int tap = 0; tap < 9; ++tap) {
        const int at = (i / kTile + tap / 3) * kSize + i % kTile + tap % 3;
        sum = mul_add(spread(patch[at][lane]), w[tap / 3][tap % 3], sum);
      }
    }
  }
}

template <int kTile, class T, class Math>
void transform_back(const Convolution& g, const WinogradBlock& block, const float* m, int64_t begin, int64_t end) {
  constexpr int kSize = kTile + 2;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t strip = block.first + tile / block.wide, image = strip / block.high;
    const int64_t top = strip % block.high * kTile, first_column = tile % block.wide * kTile;
    const int64_t rows = g.out_height - top < kTile ? g.out_height - top : kTile;
    const int64_t columns = g.out_width - first_column < kTile ? g.out_width - first_column : kTile;
    const int64_t corner = (image * g.out_height + top) * g.out_width + first_column;
    for (int64_t channel = 0; channel < g.out_channels; channel += kLanes) {
      const float* from = m + tile * block.outputs + channel;
      const int64_t lanes = lanes_at(g, channel);
      const Vec bias = bias_at(g, channel, lanes);
      const auto finish = [&](int row, const Vec(&y)[kTile]) FD_INLINE {
        if (row >= rows) return;
#pragma GCC unroll 4
        for (int j = 0; j < kTile; ++j) {
          if (j < columns) finish_pixel<T>(g, corner + row * g.out_width + j, channel, lanes, y[j] + bias);
        }
      };
      Vec halfway[kTile][kSize], squares = {};
#pragma GCC unroll 6
      for (int j = 0; j < kSize; ++j) {
        Vec d[kSize], y[kTile], square = {};
#pragma GCC unroll 6
        for (int i = 0; i < kSize; ++i) d[i] = load(from + (i * kSize + j) * block.output_step);
        transform_outputs<kTile>(d, y);
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) {
          halfway[i][j] = y[i];
          square = i == 0 ? y[0] * y[0] : mul_add(y[i], y[i], square);
        }
        squares += square;
      }
      if (__builtin_expect(!all_finite(squares), 0)) {  // if the squares are finite, no sum above or below overflows
        Vec y[kTile][kTile];
        sum_directly<kTile, T, Math>(g, block, image, top, first_column, channel, y);
        for (int i = 0; i < kTile; ++i) finish(i, y[i]);
        continue;
      }
#pragma GCC unroll 4
      for (int i = 0; i < kTile; ++i) {
        Vec y[kTile];
        transform_outputs<kTile>(halfway[i], y);
        finish(i, y);
      }
    }
  }
}

// Items: tiles.
template <class T, class Math>
void winograd_output(const Convolution& g, const WinogradBlock& block, const float* m, int64_t begin, int64_t end) {
  if (block.size == 2) transform_back<2, T, Math>(g, block, m, begin, end);
  else transform_back<4, T, Math>(g, block, m, begin, end);
}
