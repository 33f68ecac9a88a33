// Convolutions on one instruction set. convolution/convolution.cpp includes this file once for each, after simd/vec.h and
// simd/gemm.h in the same namespace.

// ---- Inputs: x, normalised and activated.

enum class Input { plain, normalised, activated };

FD_HD Input input_of(const Convolution& g) {
  return g.centre == nullptr ? Input::plain : g.silu ? Input::activated : Input::normalised;
}

struct InputMap {
  Vec centre = {}, gain = {}, offset = {};
  int64_t lanes;

  FD_HD InputMap() {}

  FD_HD InputMap(const Convolution& g, int64_t image, int64_t channel) {
    const int64_t left = g.channels - channel, at = image * g.channels + channel;
    lanes = left < kLanes ? left : kLanes;
    if (g.centre != nullptr) {
      centre = load(g.centre + at, lanes);
      gain = load(g.gain + at, lanes);
      offset = load(g.offset + at, lanes);
    }
  }

  template <Input kInput, class T>
  FD_HD Vec read(const T* from) const {
    const Vec x = lanes == kLanes ? load(from) : load(from, lanes);
    if constexpr (kInput == Input::plain) return x;
    const Vec z = fma(x - centre, gain, offset);
    if constexpr (kInput == Input::normalised) return z;
    else return silu<T>(z);
  }
};

// kLanes channels of `rows` rows from `first` on, which may lie outside of the image, as [rows][columns][kLanes].
// The image begins at column 1; around it there are zeros.
template <Input kInput, class T>
void fill_plane(const Convolution& g, int64_t image, int64_t channel, int64_t first, int64_t rows, int64_t columns,
                float* to) {
  const InputMap map(g, image, channel);
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
      const Vec value = map.template read<kInput>(from);
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

// ---- Winograd's transforms, of a row or column of vectors.

template <int kTile>
FD_HD void transform_inputs(const Vec (&d)[kTile + 2], Vec (&t)[kTile + 2]) {
  if constexpr (kTile == 2) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  } else {
    const Vec four = spread(4.0f), five = spread(-5.0f);
    const Vec a = fma(-four, d[2], d[4]), b = fma(-four, d[1], d[3]);
    const Vec c = d[4] - d[2], e = (d[3] - d[1]) * spread(2.0f);
    t[0] = fma(four, d[0], fma(five, d[2], d[4]));
    t[1] = a + b;
    t[2] = a - b;
    t[3] = c + e;
    t[4] = c - e;
    t[5] = fma(four, d[1], fma(five, d[3], d[5]));
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
    y[1] = fma(spread(2.0f), v, d);
    y[2] = fma(spread(4.0f), u, s);
    y[3] = fma(spread(8.0f), v, d) + m[5];
  }
}

template <int kTile, class Element>
FD_HD void transform_tile(const float* plane, int64_t columns, Element* to, int64_t step) {
  constexpr int kSize = kTile + 2;
  Vec halfway[kSize][kSize];
#pragma GCC unroll 6
  for (int j = 0; j < kSize; ++j) {
    Vec d[kSize], t[kSize];
#pragma GCC unroll 6
    for (int i = 0; i < kSize; ++i) d[i] = load(plane + (i * columns + j) * kLanes);
    transform_inputs<kTile>(d, t);
#pragma GCC unroll 6
    for (int i = 0; i < kSize; ++i) halfway[i][j] = t[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kSize; ++i) {
    Vec t[kSize];
    transform_inputs<kTile>(halfway[i], t);
#pragma GCC unroll 6
    for (int j = 0; j < kSize; ++j) store(to + (i * kSize + j) * step, t[j]);
  }
}

template <Input kInput, int kTile, class T, class Math>
void transform_planes(const Convolution& g, const Tiles& tiles, float* v, float* plane, int64_t begin, int64_t end) {
  typedef typename Math::Element Element;
  const int64_t columns = tiles.wide * kTile + 2, vectors = round_up(g.channels, 16) / kLanes;
  Element* to = reinterpret_cast<Element*>(v);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t channel = item % vectors * kLanes;
    const int64_t image = tiles.first / tiles.high + item / vectors;
    const int64_t from = tiles.first > image * tiles.high ? tiles.first - image * tiles.high : 0;
    const int64_t last = tiles.first + tiles.strips - image * tiles.high;
    const int64_t strips = (last < tiles.high ? last : tiles.high) - from;
    fill_plane<kInput, T>(g, image, channel, from * kTile - 1, strips * kTile + 2, columns, plane);
    int64_t tile = (image * tiles.high + from - tiles.first) * tiles.wide;
    for (int64_t strip = 0; strip < strips; ++strip) {
      for (int64_t i = 0; i < tiles.wide; ++i, ++tile) {
        transform_tile<kTile>(plane + (strip * columns + i) * kTile * kLanes, columns,
                              to + tile * tiles.inputs * Math::kPack + channel, tiles.input_step * Math::kPack);
      }
    }
  }
}

template <class T, class Math>
void winograd_input(const Convolution& g, const Tiles& tiles, float* v, float* plane, int64_t begin, int64_t end) {
  const auto run = [&](auto input) FD_INLINE {
    if (tiles.size == 2) transform_planes<decltype(input)::value, 2, T, Math>(g, tiles, v, plane, begin, end);
    else transform_planes<decltype(input)::value, 4, T, Math>(g, tiles, v, plane, begin, end);
  };
  switch (input_of(g)) {
    case Input::plain: return run(std::integral_constant<Input, Input::plain>{});
    case Input::normalised: return run(std::integral_constant<Input, Input::normalised>{});
    case Input::activated: return run(std::integral_constant<Input, Input::activated>{});
  }
}

template <class Math>
void winograd_multiply(const Convolution& g, const Tiles& tiles, const float* v, float* m, int64_t begin, int64_t end) {
  const int64_t panels = g.panels(), depth = (g.channels + Math::kPack - 1) / Math::kPack, no_offset = 0;
  const char* rows[kMostRows];
  for (int64_t item = begin; item < end; ++item) {
    const int64_t frequency = item / panels, panel = item % panels, width = g.panel_width(panel);
    const float* weight = g.weight + (frequency * tiles.outputs + panel * kPanel) * depth;
    for (int64_t first = 0; first < tiles.count(); first += kMostRows) {
      const int64_t count = tiles.count() - first < kMostRows ? tiles.count() - first : kMostRows;
      for (int64_t i = 0; i < count; ++i) {
        rows[i] = reinterpret_cast<const char*>(v + frequency * tiles.input_step + (first + i) * tiles.inputs);
      }
      float* to = m + frequency * tiles.output_step + first * tiles.outputs + panel * kPanel;
      multiply_panel<Math>(Left{rows, &no_offset, 1, depth}, 0, count, weight, width,
                           [&](int64_t row, int64_t column, Vec sum)
                               FD_INLINE { store(to + row * tiles.outputs + column, sum); });
    }
  }
}

// Writes a vector of outputs of one pixel: `at` counts pixels.
template <class T>
FD_HD void finish_pixel(const Convolution& g, int64_t at, int64_t channel, int64_t lanes, Vec value) {
  T* to = static_cast<T*>(g.out) + at * g.out_pixel + channel;
  if (g.residual != nullptr) {
    const T* residual = static_cast<const T*>(g.residual) + at * g.residual_pixel + channel;
    value += lanes == kLanes ? load(residual) : load(residual, lanes);
  }
  if (lanes == kLanes) store(to, value);
  else store(to, value, lanes);
}

FD_HD int64_t lanes_at(const Convolution& g, int64_t channel) {
  const int64_t left = g.out_channels - channel;
  return left < kLanes ? left : kLanes;
}

FD_HD Vec bias_at(const Convolution& g, int64_t channel, int64_t lanes) {
  return g.bias == nullptr ? Vec{} : load(g.bias + channel, lanes);
}

// The filter's taps that became these numbers in a row or column of frequencies.
template <int kTile>
FD_HD void recover_taps(const Vec (&u)[kTile + 2], Vec (&w)[3]) {
  if constexpr (kTile == 2) {
    w[0] = u[0];
    w[1] = u[1] - u[2];
    w[2] = u[3];
  } else {
    w[0] = u[0] * spread(4.0f);
    w[1] = (u[2] - u[1]) * spread(3.0f);
    w[2] = u[5];
  }
}

// The pixels that a tile reads, kLanes channels of each; zeros outside of the image.
template <int kTile, Input kInput, class T>
void read_patch(const Convolution& g, int64_t image, int64_t channel, int64_t top, int64_t left,
                float (&patch)[(kTile + 2) * (kTile + 2)][kLanes]) {
  const InputMap map(g, image, channel);
  for (int i = 0; i < (kTile + 2) * (kTile + 2); ++i) {
    const int64_t row = top + i / (kTile + 2) - 1, column = left + i % (kTile + 2) - 1;
    const bool inside = row >= 0 && row < g.in_height() && column >= 0 && column < g.in_width();
    const int64_t at = ((image * g.height + row / g.scale) * g.width + column / g.scale) * g.x_pixel;
    store(patch[i], inside ? map.template read<kInput>(static_cast<const T*>(g.x) + at + channel) : Vec{});
  }
}

// The sums of a tile, for kLanes outputs, by the direct convolution. Winograd's sums are differences of numbers up to a
// hundred times as large as the inputs: near the largest float32 these are infinite where the outputs are not, and NaN or
// infinity would reach all outputs of the tile.
template <int kTile, class T, class Math>
__attribute__((noinline)) void sum_directly(const Convolution& g, const Tiles& tiles, int64_t image, int64_t top,
                                            int64_t left, int64_t out_channel, Vec (&y)[kTile][kTile]) {
  constexpr int kSize = kTile + 2;
  const int64_t panel = out_channel / kPanel, column = out_channel % kPanel, width = g.panel_width(panel);
  const int64_t depth = (g.channels + Math::kPack - 1) / Math::kPack;
  alignas(64) float patch[kSize * kSize][kLanes];
  for (int i = 0; i < kTile * kTile; ++i) y[i / kTile][i % kTile] = Vec{};
  for (int64_t channel = 0; channel < g.channels; ++channel) {
    const int64_t lane = channel % kLanes;
    if (lane == 0) {
      switch (input_of(g)) {
        case Input::plain: read_patch<kTile, Input::plain, T>(g, image, channel, top, left, patch); break;
        case Input::normalised: read_patch<kTile, Input::normalised, T>(g, image, channel, top, left, patch); break;
        case Input::activated: read_patch<kTile, Input::activated, T>(g, image, channel, top, left, patch); break;
      }
    }
    Vec halfway[kSize][3], w[3][3];
    for (int i = 0; i < kSize; ++i) {
      Vec u[kSize];
      for (int j = 0; j < kSize; ++j) {
        const float* weight = g.weight + ((i * kSize + j) * tiles.outputs + panel * kPanel) * depth;
        u[j] = Math::columns(weight, width, channel, column);
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
        sum = fma(spread(patch[at][lane]), w[tap / 3][tap % 3], sum);
      }
    }
  }
}

template <int kTile, class T, class Math>
void transform_back(const Convolution& g, const Tiles& tiles, const float* m, int64_t begin, int64_t end) {
  constexpr int kSize = kTile + 2;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t strip = tiles.first + tile / tiles.wide, image = strip / tiles.high;
    const int64_t top = strip % tiles.high * kTile, left = tile % tiles.wide * kTile;
    const int64_t rows = g.out_height - top < kTile ? g.out_height - top : kTile;
    const int64_t columns = g.out_width - left < kTile ? g.out_width - left : kTile;
    const int64_t corner = (image * g.out_height + top) * g.out_width + left;
    for (int64_t channel = 0; channel < g.out_channels; channel += kLanes) {
      const float* from = m + tile * tiles.outputs + channel;
      const int64_t lanes = lanes_at(g, channel);
      const Vec bias = bias_at(g, channel, lanes);
      const auto finish = [&](int row, const Vec (&y)[kTile]) FD_INLINE {
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
        for (int i = 0; i < kSize; ++i) d[i] = load(from + (i * kSize + j) * tiles.output_step);
        transform_outputs<kTile>(d, y);
#pragma GCC unroll 4
        for (int i = 0; i < kTile; ++i) {
          halfway[i][j] = y[i];
          square = i == 0 ? y[0] * y[0] : fma(y[i], y[i], square);
        }
        squares += square;
      }
      if (__builtin_expect(!all_finite(squares), 0)) {  // else no sum above overflowed, and none below does
        Vec y[kTile][kTile];
        sum_directly<kTile, T, Math>(g, tiles, image, top, left, channel, y);
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

template <class T, class Math>
void winograd_output(const Convolution& g, const Tiles& tiles, const float* m, int64_t begin, int64_t end) {
  if (tiles.size == 2) transform_back<2, T, Math>(g, tiles, m, begin, end);
  else transform_back<4, T, Math>(g, tiles, m, begin, end);
}

// ---- The direct convolution.

template <Input kInput, class T, class Math>
void copy_rows(const Convolution& g, const Rows& block, void* to, int64_t begin, int64_t end) {
  typedef typename Math::Element Element;
  const int64_t words = block.pixel / static_cast<int64_t>(sizeof(Element));
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = block.image + item / block.in_rows;
    const int64_t row = block.row * g.stride - g.padding + item % block.in_rows;
    Element* next = static_cast<Element*>(to) + item * block.columns * words;
    if (row < 0 || row >= g.in_height()) {
      memset(next, 0, block.columns * block.pixel);
      continue;
    }
    const T* from = static_cast<const T*>(g.x) + (image * g.height + row / g.scale) * g.width * g.x_pixel;
    for (int64_t channel = 0; channel < g.channels; channel += kLanes) {
      const InputMap map(g, image, channel);
      for (int64_t column = 0; column < block.columns; ++column) {
        const int64_t at = column - g.padding;
        const bool inside = at >= 0 && at < g.in_width();
        store(next + column * words + channel,
              inside ? map.template read<kInput>(from + at / g.scale * g.x_pixel + channel) : Vec{});
      }
    }
  }
}

template <class T, class Math>
void direct_input(const Convolution& g, const Rows& block, void* to, int64_t begin, int64_t end) {
  switch (input_of(g)) {
    case Input::plain: return copy_rows<Input::plain, T, Math>(g, block, to, begin, end);
    case Input::normalised: return copy_rows<Input::normalised, T, Math>(g, block, to, begin, end);
    case Input::activated: return copy_rows<Input::activated, T, Math>(g, block, to, begin, end);
  }
}

// Items: panels, and of each the outputs, kMostRows at a time.
template <class T, class Math>
void direct_multiply(const Convolution& g, const Rows& block, const void* from, int64_t begin, int64_t end) {
  const int64_t pixels = block.count(g), chunks = (pixels + kMostRows - 1) / kMostRows;
  const int64_t depth = (g.channels + Math::kPack - 1) / Math::kPack, taps = g.kernel * g.kernel;
  int64_t offsets[9], at[kMostRows];
  const char* rows[kMostRows];
  for (int64_t tap = 0; tap < taps; ++tap) {
    offsets[tap] = (tap / g.kernel * block.columns + tap % g.kernel) * block.pixel;
  }
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = item / chunks, first = item % chunks * kMostRows;
    const int64_t count = pixels - first < kMostRows ? pixels - first : kMostRows;
    int64_t column = first % g.out_width, row = first / g.out_width % block.rows;
    int64_t image = first / g.out_width / block.rows;
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = static_cast<const char*>(from) + image * block.image_step +
                (row * block.columns + column) * g.stride * block.pixel;
      at[i] = ((block.image + image) * g.out_height + block.row + row) * g.out_width + column;
      if (++column == g.out_width) {
        column = 0;
        if (++row == block.rows) row = 0, ++image;
      }
    }
    const float* weight = g.weight + panel * kPanel * taps * depth;
    multiply_panel<Math>(Left{rows, offsets, taps, depth}, 0, count, weight, g.panel_width(panel),
                         [&](int64_t row, int64_t column, Vec sum) FD_INLINE {
                           const int64_t channel = panel * kPanel + column, lanes = lanes_at(g, channel);
                           if (lanes > 0) {
                             finish_pixel<T>(g, at[row], channel, lanes, sum + bias_at(g, channel, lanes));
                           }
                         });
  }
}

#undef FD_LANES
#undef FD_BFLOAT16
#undef FD_PAIRS
