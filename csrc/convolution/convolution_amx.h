// Convolutions by AMX: the left factors are pixels, the right ones weights. convolution/convolution.cpp includes this file after
// amx/tile_gemm.h and convolution/convolution_cpu.h in the same namespace.

// ---- Numbers as AMX multiplies them: kCopies rows of 64 bytes for kChunk channels of a pixel.

struct Halved {
  static constexpr int kCopies = 1, kChunk = kPairChunk, kOutputs = 32, kSums = 1;
  static constexpr int64_t kHeadBytes = 0;  // before the weights of a panel
  static constexpr bool kMerges = false;    // or NaN would reach beyond the filter, where a weight is 0

  static FD_HD Vec factor(const Convolution&, int64_t, int64_t) { return Vec{}; }

  static FD_HD int32_t zero(const Convolution&, int64_t) { return 0; }

  static FD_HD void write(char* to, int64_t step, const Vec (&numbers)[2], const Vec (&)[2], int32_t) {
    store_parts<1>(to, step, numbers[0], numbers[1]);
  }

  template <class Meanwhile>
  static FD_HD void multiply(int64_t rows, int64_t columns, const Factors& f, const char*, int32_t, float* sums,
                             const Meanwhile& meanwhile) {
    sum_products<1>(rows, columns, f, sums, 128, meanwhile);
  }

  static FD_HD Vec scales(const Convolution&, const char*, int64_t) { return Vec{}; }

  static FD_HD Vec sum(const float* sums, int half, Vec) { return load(sums + half * kLanes); }
};

struct Digits {
  static constexpr int kCopies = 3, kChunk = kByteChunk, kOutputs = 16, kSums = 3;
  static constexpr int64_t kHeadBytes = 256;  // for each output a scale, and what its sums start from where 0 is kZero
  static constexpr bool kMerges = true;

  // What takes a channel's numbers to whole ones.
  static FD_HD Vec factor(const Convolution& g, int64_t image, int64_t channel) {
    return load(g.shares + channel) * spread(g.scales[image].inverse);
  }

  static FD_HD int32_t zero(const Convolution& g, int64_t image) { return g.scales[image].zero; }

  static FD_HD void write(char* to, int64_t step, const Vec (&numbers)[4], const Vec (&factors)[4], int32_t zero) {
    store_digits(to, step, numbers, factors, zero);
  }

  template <class Meanwhile>
  static FD_HD void multiply(int64_t rows, int64_t, const Factors& f, const char* head, int32_t zero, float* sums,
                             const Meanwhile& meanwhile) {
    alignas(64) static constexpr int32_t kNothing[48] = {};
    const int32_t* start = zero == 0 ? kNothing : reinterpret_cast<const int32_t*>(head + 64);
    int32_t* whole = reinterpret_cast<int32_t*>(sums);
    if (rows > 16) sum_digit_products<2>(f, start, whole, meanwhile);
    else sum_digit_products<1>(f, start, whole, meanwhile);
  }

  static FD_HD Vec scales(const Convolution& g, const char* head, int64_t image) {
    return load(reinterpret_cast<const float*>(head)) * spread(g.scales[image].scale);
  }

  static FD_HD Vec sum(const float* sums, int, Vec scales) {
    const auto whole = [&](int unit) FD_INLINE {
      return (Vec)_mm512_cvtepi32_ps(_mm512_load_si512(sums + unit * 512));
    };
    return fma(whole(2), spread(0x1p-16f), fma(whole(1), spread(0x1p-8f), whole(0))) * scales;
  }
};

// ---- Scales of the images.

constexpr uint32_t kInfinite = 0x7F800000, kMagnitude = 0x7FFFFFFF;  // bits of numbers, which are in their order
constexpr uint32_t kSpoiled = 0x80000000;                            // beside the largest finite number of a row

FD_HD __m512i magnitude_bits(Vec x) { return _mm512_and_si512((__m512i)x, _mm512_set1_epi32(kMagnitude)); }

FD_HD __mmask16 finite(__m512i magnitude) { return _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(kInfinite)); }

// The largest number of each row of x, as its bits, and whether any is NaN or infinite. Items: rows of all images.
template <class T>
void amx_largest(const Convolution& g, uint32_t* to, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const T* from = static_cast<const T*>(g.x) + item * g.width * g.x_pixel;
    __m512i result = _mm512_setzero_si512();
    __mmask16 all_finite = 0xFFFF;
    for (int64_t channel = 0; channel < g.channels; channel += kLanes) {
      const InputMap map(g, item / g.height, channel);
      const Vec share = load(g.shares + channel);
      for (int64_t column = 0; column < g.width; ++column) {
        const Vec x = map.template read<Input::plain>(from + column * g.x_pixel + channel);
        const __m512i magnitude = magnitude_bits(x * share);
        const __mmask16 usable = finite(magnitude);
        all_finite &= usable;
        result = _mm512_mask_max_epu32(result, usable, result, magnitude);
      }
    }
    to[item] = _mm512_reduce_max_epu32(result) | (all_finite == 0xFFFF ? 0 : kSpoiled);
  }
}

// The same for a whole image, by the bounds of its channels.
inline uint32_t amx_largest_bound(const Convolution& g, int64_t image) {
  uint32_t result = 0;
  for (int64_t channel = 0; channel < g.channels; ++channel) {
    const float bound = g.bounds[image * g.channels + channel] * g.shares[channel];
    uint32_t bits;
    memcpy(&bits, &bound, sizeof bits);
    bits &= kMagnitude;
    result = bits < kInfinite ? std::max(result & kMagnitude, bits) | (result & kSpoiled) : result | kSpoiled;
  }
  return result;
}

// An image's scale, of the largest numbers of its rows, and what divides by it. After SiLU, which is hardly below 0,
// most digits are for what is above it, if that is finer.
inline ImageScale amx_scale(const Convolution& g, const uint32_t* rows) {
  uint32_t bits = 0x0D800000;  // 2^-100: what divides by less is infinite
  for (int64_t row = 0; row < g.height; ++row) bits = std::max(bits, rows[row] & kMagnitude);
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  const float lowest = std::min(kLowestSilu, largest);
  const float even = largest / kLargestDigit;
  const float uneven = std::max(largest / (kLargestDigit + kZero), lowest / (kLargestDigit - kZero));
  const int32_t zero = g.silu && uneven < even ? kZero : 0;
  const float scale = zero == 0 ? even : uneven;
  return {scale, 65536 / scale, zero};
}

// From the first to the last output that reads pixels `first` to `last` of a row or column of an upsampled image.
struct Readers {
  int64_t first, last;

  FD_HD Readers(const Convolution& g, int64_t pixel, int64_t outputs) {
    const int64_t from = pixel * g.scale + g.padding - (g.kernel - 1), to = (pixel + 1) * g.scale - 1 + g.padding;
    first = from <= 0 ? 0 : (from + g.stride - 1) / g.stride;
    last = to / g.stride < outputs ? to / g.stride : outputs - 1;
  }
};

// Makes NaN what depends on NaN or infinity, which have no digits. rows: as amx_largest leaves them.
template <class T>
void amx_spoil(const Convolution& g, int64_t image, const uint32_t* rows) {
  for (int64_t row = 0; row < g.height; ++row) {
    if ((rows[row] & kSpoiled) == 0) continue;
    const Readers high(g, row, g.out_height);
    for (int64_t column = 0; column < g.width; ++column) {
      const T* from = static_cast<const T*>(g.x) + ((image * g.height + row) * g.width + column) * g.x_pixel;
      __mmask16 all_finite = 0xFFFF;
      for (int64_t channel = 0; channel < g.channels; channel += kLanes) {
        const InputMap map(g, image, channel);
        const Vec number = g.centre == nullptr ? map.template read<Input::plain>(from + channel)
                                               : map.template read<Input::normalised>(from + channel);
        all_finite &= finite(magnitude_bits(number));
      }
      if (all_finite == 0xFFFF) continue;
      const Readers wide(g, column, g.out_width);
      for (int64_t y = high.first; y <= high.last; ++y) {
        for (int64_t x = wide.first; x <= wide.last; ++x) {
          T* to = static_cast<T*>(g.out) + ((image * g.out_height + y) * g.out_width + x) * g.out_pixel;
          for (int64_t k = 0; k < g.out_channels; k += kLanes) {
            store(to + k, spread(__builtin_nanf("")), lanes_at(g, k));
          }
        }
      }
    }
  }
}

// ---- Inputs.

template <class Numbers>
FD_HD void clear_pixels(char* to, int64_t part_step, int64_t count, int32_t zero) {
  memset(to, -zero, count * kRowBytes);
  for (int part = 1; part < Numbers::kCopies; ++part) memset(to + part * part_step, 0, count * kRowBytes);
}

// Where the pixels of a row of inputs come from, and in `next` where they go to; null, and cleared, where it is padding.
template <class T, class Numbers>
FD_HD const T* begin_row(const Convolution& g, const Pixels& block, int64_t item, char* to, char** next) {
  const int64_t part_step = block.count * kRowBytes, image = block.image + item / block.in_rows;
  const int64_t row = block.row * g.stride - g.padding + item % block.in_rows;
  const int32_t zero = Numbers::zero(g, image);
  *next = to + block.input(item) * kRowBytes;
  if (item % block.in_rows == block.in_rows - 1) {  // the pixel behind the image
    clear_pixels<Numbers>(*next + block.columns * kRowBytes, part_step, 1, zero);
  }
  if (row < 0 || row >= g.in_height()) {
    clear_pixels<Numbers>(*next, part_step, block.columns, zero);
    return nullptr;
  }
  return static_cast<const T*>(g.x) + (image * g.height + row / g.scale) * g.width * g.x_pixel;
}

// Items: rows of the input pixels of all images, as [chunk][copy][pixel][64 bytes].
template <Input kInput, class T, class Numbers>
void copy_pixels(const Convolution& g, const Pixels& block, char* to, int64_t begin, int64_t end) {
  constexpr int kVectors = Numbers::kChunk / kLanes;
  const int64_t part_step = block.count * kRowBytes;
  const int64_t left = g.padding < block.columns ? g.padding : block.columns;
  const int64_t inside = g.in_width() < block.columns - left ? g.in_width() : block.columns - left;
  for (int64_t channel = 0; channel < g.channels; channel += Numbers::kChunk, to += Numbers::kCopies * part_step) {
    const bool whole = channel + Numbers::kChunk <= g.channels;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = block.image + item / block.in_rows;
      char* next;
      const T* from = begin_row<T, Numbers>(g, block, item, to, &next);
      if (from == nullptr) continue;
      const int32_t zero = Numbers::zero(g, image);
      InputMap maps[kVectors];
      for (int i = 0; i < kVectors; ++i) {
        if (channel + i * kLanes < g.channels) maps[i] = InputMap(g, image, channel + i * kLanes);
      }
      Vec factors[kVectors];
      for (int i = 0; i < kVectors; ++i) factors[i] = Numbers::factor(g, image, channel + i * kLanes);
      clear_pixels<Numbers>(next, part_step, left, zero);
      next += left * kRowBytes;
      for (int64_t column = 0; column < inside; ++column, next += kRowBytes) {
        const T* pixel = from + (g.scale == 2 ? column / 2 : column) * g.x_pixel + channel;
        Vec numbers[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          const bool some = whole || channel + i * kLanes < g.channels;
          numbers[i] = some ? maps[i].template read<kInput>(pixel + i * kLanes) : Vec{};
        }
        Numbers::write(next, part_step, numbers, factors, zero);
      }
      clear_pixels<Numbers>(next, part_step, block.columns - left - inside, zero);
    }
  }
}

// The same for few channels: beside each pixel stand the next ones, of which there are none behind a row's end.
template <Input kInput, class T, class Numbers, int kMerged>
void merge_pixels(const Convolution& g, const Pixels& block, char* to, int64_t begin, int64_t end) {
  constexpr int kVectors = Numbers::kChunk / kLanes, kOwn = kVectors / kMerged;  // kOwn: vectors of a pixel
  const int64_t part_step = block.count * kRowBytes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = block.image + item / block.in_rows;
    char* next;
    const T* from = begin_row<T, Numbers>(g, block, item, to, &next);
    if (from == nullptr) continue;
    const int32_t zero = Numbers::zero(g, image);
    InputMap maps[kOwn];
    for (int i = 0; i < kOwn; ++i) {
      if (i * kLanes < g.channels) maps[i] = InputMap(g, image, i * kLanes);
    }
    Vec numbers[kVectors] = {}, factors[kVectors];
    for (int i = 0; i < kVectors; ++i) factors[i] = Numbers::factor(g, image, i % kOwn * kLanes);
    for (int64_t column = 1 - kMerged; column < block.columns; ++column) {
#pragma GCC unroll 4
      for (int i = 0; i < kOwn * (kMerged - 1); ++i) numbers[i] = numbers[i + kOwn];
      const int64_t last = column + kMerged - 1, x = last - g.padding;
      const bool inside = last < block.columns && x >= 0 && x < g.in_width();
      const T* pixel = from + (g.scale == 2 ? x / 2 : x) * g.x_pixel;
#pragma GCC unroll 4
      for (int i = 0; i < kOwn; ++i) {
        const bool some = inside && i * kLanes < g.channels;
        numbers[(kMerged - 1) * kOwn + i] = some ? maps[i].template read<kInput>(pixel + i * kLanes) : Vec{};
      }
      if (column < 0) continue;
      Numbers::write(next, part_step, numbers, factors, zero);
      next += kRowBytes;
    }
  }
}

template <class T, class Numbers>
void amx_input(const Convolution& g, const Pixels& block, char* to, int64_t begin, int64_t end) {
  const auto run = [&](auto input) FD_INLINE {
    constexpr Input kInput = decltype(input)::value;
    if constexpr (Numbers::kMerges) {
      if (block.merged == 3) return merge_pixels<kInput, T, Numbers, 3>(g, block, to, begin, end);
      if (block.merged == 2) return merge_pixels<kInput, T, Numbers, 2>(g, block, to, begin, end);
    }
    return copy_pixels<kInput, T, Numbers>(g, block, to, begin, end);
  };
  switch (input_of(g)) {
    case Input::plain: return run(std::integral_constant<Input, Input::plain>{});
    case Input::normalised: return run(std::integral_constant<Input, Input::normalised>{});
    case Input::activated: return run(std::integral_constant<Input, Input::activated>{});
  }
}

// ---- Products.

// Sums of 32 pixels and some outputs on their way to the output, pixel by pixel, so that this can be done while AMX is
// busy with the next ones.
template <class T, class Numbers>
struct Finisher {
  const float* sums;  // [pixel][outputs]
  int64_t left = 0;   // pixels
  int64_t at, column, columns, out_width, channel, lanes, more;
  Vec bias, bias_of_more, scales;

  FD_HD Finisher() {}

  FD_HD Finisher(const Convolution& g, const Pixels& block, int64_t line, int64_t first, int64_t count,
                 int64_t channel_, const char* head, const float* sums_)
      : sums(sums_), left(count), columns(block.columns), out_width(g.out_width), channel(channel_) {
    const int64_t image = block.image + (block.flat ? line : line / block.rows);
    const int64_t row = block.row + (block.flat ? first / columns : line % block.rows);
    column = block.flat ? first % columns : first;
    at = (image * g.out_height + row) * out_width + (column < out_width ? column : out_width);
    lanes = lanes_at(g, channel);
    more = Numbers::kOutputs > kLanes && channel + kLanes < g.out_channels ? lanes_at(g, channel + kLanes) : 0;
    bias = bias_at(g, channel, lanes);
    bias_of_more = more > 0 ? bias_at(g, channel + kLanes, more) : Vec{};
    scales = Numbers::scales(g, head, image);
  }

  FD_HD void advance(const Convolution& g, int64_t count) {
    for (; count > 0 && left > 0; --count, --left, sums += Numbers::kOutputs) {
      if (column < out_width) {
        finish_pixel<T>(g, at, channel, lanes, Numbers::sum(sums, 0, scales) + bias);
        if (more > 0) finish_pixel<T>(g, at, channel + kLanes, more, Numbers::sum(sums, 1, scales) + bias_of_more);
        ++at;
      }
      if (++column == columns) column = 0;
    }
  }
};

// Items: panels of outputs, and 32 pixels of a line; the ones or the others come first.
template <class T, class Numbers>
void amx_multiply(const Convolution& g, const Pixels& block, const char* from, int64_t begin, int64_t end) {
  load_shapes();
  alignas(64) float sums[2][Numbers::kSums * 32 * Numbers::kOutputs];
  Finisher<T, Numbers> before;
  const int64_t panels = (g.out_channels + Numbers::kOutputs - 1) / Numbers::kOutputs;
  const int64_t wide = (g.kernel + block.merged - 1) / block.merged, taps = g.kernel * wide;
  int64_t offsets[9];
  for (int64_t tap = 0; tap < taps; ++tap) {
    offsets[tap] = (tap / wide * block.columns + tap % wide * block.merged) * kRowBytes;
  }
  const int64_t line_blocks = (block.length + 31) / 32, blocks = block.lines * line_blocks;
  Factors f{};
  f.row_step = g.stride * kRowBytes, f.part_step = block.count * kRowBytes, f.chunk_step = Numbers::kCopies * f.part_step;
  f.chunks = (g.channels + Numbers::kChunk - 1) / Numbers::kChunk, f.taps = offsets, f.tap_count = taps;
  const int64_t group_bytes = Numbers::kOutputs / 16 * Numbers::kCopies * kTileBytes;  // of weights, for a tap and chunk
  const int64_t panel_bytes = Numbers::kHeadBytes + f.chunks * taps * group_bytes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = block.panels_first ? item / blocks : item % panels;
    const int64_t part = block.panels_first ? item % blocks : item / panels;
    const int64_t line = part / line_blocks, first = part % line_blocks * 32;
    const int64_t count = block.length - first < 32 ? block.length - first : 32;
    const char* head = reinterpret_cast<const char*>(g.weight) + panel * panel_bytes;
    f.left = from + (block.start(g, line) + first * g.stride) * kRowBytes;
    f.right = head + Numbers::kHeadBytes;
    const bool fetching = block.panels_first && panel + 1 < panels;
    f.fetch = fetching ? (group_bytes / 64 + blocks - 1) / blocks : 0;
    f.next = head + panel_bytes + part * f.fetch * f.chunks * taps * 64;
    const int64_t share = (before.left + f.chunks * taps - 1) / (f.chunks * taps);
    const auto meanwhile = [&]() FD_INLINE { before.advance(g, share); };
    float* here = sums[item % 2];
    const int64_t channel = panel * Numbers::kOutputs;
    const int32_t zero = Numbers::zero(g, block.image + (block.flat ? line : line / block.rows));
    Numbers::multiply(count, g.out_channels - channel, f, head, zero, here, meanwhile);
    before = Finisher<T, Numbers>(g, block, line, first, count, channel, head, here);
  }
  before.advance(g, before.left);
  _tile_release();
}
