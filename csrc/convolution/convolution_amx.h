// Convolutions by AMX: the left factors are pixels, the right factors weights. Included after convolution/pixels_cpu.h
// and amx/tile_gemm.h.

// ---- Formats of AMX's factors: kPieces rows of 64 bytes for kChunk channels of a pixel.

// Numbers rounded to bfloat16.
struct Bfloat16Format {
  static constexpr int kPieces = 1, kChunk = kPairChunk, kOutputs = 32, kSums = 1;
  static constexpr int64_t kHeaderBytes = 0;  // before the weights of a panel
  // Whether neighbouring pixels are merged into one row. False: a zero weight times a NaN neighbour would be NaN.
  static constexpr bool kMerges = false;

  static FD_HD Vec factor(const Convolution&, int64_t, int64_t) { return Vec{}; }

  static FD_HD int32_t zero(const Convolution&, int64_t) { return 0; }

  static FD_HD void write(char* to, int64_t step, const Vec (&numbers)[2], const Vec (&)[2], int32_t) {
    store_splits<1>(to, step, numbers[0], numbers[1]);
  }

  template <class Overlapped>
  static FD_HD void multiply(int64_t rows, int64_t columns, const Factors& f, const char*, int32_t, float* sums,
                             const Overlapped& overlapped) {
    sum_products<1>(rows, columns, f, sums, 128, overlapped);
  }

  static FD_HD Vec scales(const Convolution&, const char*, int64_t) { return Vec{}; }

  static FD_HD Vec sum(const float* sums, int half, Vec) { return load(sums + half * kLanes); }
};

// Three int8 limbs of a number that is quantised with its image's scale.
struct Int8Format {
  static constexpr int kPieces = 3, kChunk = kByteChunk, kOutputs = 16, kSums = 3;
  static constexpr int64_t kHeaderBytes = 256;  // for each output its scale, then the initial sums for zero = kZero
  static constexpr bool kMerges = true;

  // The factor that scales a channel's numbers to integers.
  static FD_HD Vec factor(const Convolution& g, int64_t image, int64_t channel) {
    return load(g.channel_scales + channel) * spread(g.scales[image].inverse);
  }

  static FD_HD int32_t zero(const Convolution& g, int64_t image) { return g.scales[image].zero; }

  static FD_HD void write(char* to, int64_t step, const Vec (&numbers)[4], const Vec (&factors)[4], int32_t zero) {
    store_limbs(to, step, numbers, factors, zero);
  }

  template <class Overlapped>
  static FD_HD void multiply(int64_t rows, int64_t, const Factors& f, const char* header, int32_t zero, float* sums,
                             const Overlapped& overlapped) {
    alignas(64) static constexpr int32_t kZeros[48] = {};
    const int32_t* start = zero == 0 ? kZeros : reinterpret_cast<const int32_t*>(header + 64);
    int32_t* whole = reinterpret_cast<int32_t*>(sums);
    if (rows > 16) sum_limb_products<2>(f, start, whole, overlapped);
    else sum_limb_products<1>(f, start, whole, overlapped);
  }

  static FD_HD Vec scales(const Convolution& g, const char* header, int64_t image) {
    return load(reinterpret_cast<const float*>(header)) * spread(g.scales[image].scale);
  }

  static FD_HD Vec sum(const float* sums, int, Vec scales) {
    const auto whole = [&](int unit)
                           FD_INLINE { return (Vec)_mm512_cvtepi32_ps(_mm512_load_si512(sums + unit * 512)); };
    return mul_add(whole(2), spread(0x1p-16f), mul_add(whole(1), spread(0x1p-8f), whole(0))) * scales;
  }
};

// ---- Scales of the images.

// The bits of magnitudes of float32, as integers, are in the order of the magnitudes.
constexpr uint32_t kInfinite = 0x7F800000, kMagnitude = 0x7FFFFFFF;
constexpr uint32_t kNonFinite = 0x80000000;  // set beside a row's largest magnitude if the row has a NaN or infinity

FD_HD __m512i magnitude_bits(Vec x) { return _mm512_and_si512((__m512i)x, _mm512_set1_epi32(kMagnitude)); }

FD_HD __mmask16 finite(__m512i magnitude) { return _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(kInfinite)); }

// to[row]: the bits of the row's largest finite magnitude, and kNonFinite. Items: rows of x of all images.
template <class T>
void amx_largest(const Convolution& g, uint32_t* to, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    const T* from = static_cast<const T*>(g.x) + item * g.width * g.x_pixel;
    __m512i result = _mm512_setzero_si512();
    __mmask16 all_finite = 0xFFFF;
    for (int64_t channel = 0; channel < g.channels; channel += kLanes) {
      const InputReader reader(g, item / g.height, channel);
      const Vec scales = load(g.channel_scales + channel);
      for (int64_t column = 0; column < g.width; ++column) {
        const Vec x = reader.template read<Transform::plain>(from + column * g.x_pixel + channel);
        const __m512i magnitude = magnitude_bits(x * scales);
        const __mmask16 usable = finite(magnitude);
        all_finite &= usable;
        result = _mm512_mask_max_epu32(result, usable, result, magnitude);
      }
    }
    to[item] = _mm512_reduce_max_epu32(result) | (all_finite == 0xFFFF ? 0 : kNonFinite);
  }
}

// The same for a whole image, from the bounds of its channels.
inline uint32_t amx_largest_bound(const Convolution& g, int64_t image) {
  uint32_t result = 0;
  for (int64_t channel = 0; channel < g.channels; ++channel) {
    const float bound = g.bounds[image * g.channels + channel] * g.channel_scales[channel];
    uint32_t bits;
    memcpy(&bits, &bound, sizeof bits);
    bits &= kMagnitude;
    result = bits < kInfinite ? std::max(result & kMagnitude, bits) | (result & kNonFinite) : result | kNonFinite;
  }
  return result;
}

// An image's scale, from the largest magnitudes of its rows. After SiLU, whose results are hardly below 0, most of the
// top limb's range is used for positive numbers, if that makes the scale smaller.
inline ImageScale amx_scale(const Convolution& g, const uint32_t* rows) {
  uint32_t bits = 0x0D800000;  // 2^-100: the inverse of a smaller scale would overflow
  for (int64_t row = 0; row < g.height; ++row) bits = std::max(bits, rows[row] & kMagnitude);
  float largest;
  memcpy(&largest, &bits, sizeof largest);
  const float lowest = std::min(kLowestSilu, largest);
  const float even = largest / kLargestLimb;
  const float uneven = std::max(largest / (kLargestLimb + kZero), lowest / (kLargestLimb - kZero));
  const int32_t zero = g.silu && uneven < even ? kZero : 0;
  const float scale = zero == 0 ? even : uneven;
  return {scale, 65536 / scale, zero};
}

// The first and the last output, along a row or column, that reads pixel `pixel` of the image before upsampling.
struct Readers {
  int64_t first, last;

  FD_HD Readers(const Convolution& g, int64_t pixel, int64_t outputs) {
    const int64_t from = pixel * g.scale + g.padding - (g.kernel - 1), to = (pixel + 1) * g.scale - 1 + g.padding;
    first = from <= 0 ? 0 : (from + g.stride - 1) / g.stride;
    last = to / g.stride < outputs ? to / g.stride : outputs - 1;
  }
};

// Sets every output that depends on a NaN or infinity to NaN, because limbs cannot hold one. rows: from amx_largest.
template <class T>
void amx_poison_non_finite(const Convolution& g, int64_t image, const uint32_t* rows) {
  for (int64_t row = 0; row < g.height; ++row) {
    if ((rows[row] & kNonFinite) == 0) continue;
    const Readers high(g, row, g.out_height);
    for (int64_t column = 0; column < g.width; ++column) {
      const T* from = static_cast<const T*>(g.x) + ((image * g.height + row) * g.width + column) * g.x_pixel;
      __mmask16 all_finite = 0xFFFF;
      for (int64_t channel = 0; channel < g.channels; channel += kLanes) {
        const InputReader reader(g, image, channel);
        const Vec number = g.centre == nullptr ? reader.template read<Transform::plain>(from + channel)
                                               : reader.template read<Transform::normalised>(from + channel);
        all_finite &= finite(magnitude_bits(number));
      }
      if (all_finite == 0xFFFF) continue;
      const Readers wide(g, column, g.out_width);
      for (int64_t y = high.first; y <= high.last; ++y) {
        for (int64_t x = wide.first; x <= wide.last; ++x) {
          T* to = static_cast<T*>(g.out) + ((image * g.out_height + y) * g.out_width + x) * g.out_pixel;
          for (int64_t k = 0; k < g.results; k += kLanes) {
            store(to + k, spread(__builtin_nanf("")), g.results - k < kLanes ? g.results - k : kLanes);
          }
        }
      }
    }
  }
}

// ---- Inputs.

// Writes `count` pixels of zeros.
template <class Format>
FD_HD void clear_pixels(char* to, int64_t piece_step, int64_t count, int32_t zero) {
  memset(to, -zero, count * kRowBytes);
  for (int piece = 1; piece < Format::kPieces; ++piece) memset(to + piece * piece_step, 0, count * kRowBytes);
}

// Returns where the pixels of a row of inputs are read, and sets `next` to where they are written. Returns null for a
// row of padding, after clearing it.
template <class T, class Format>
FD_HD const T* begin_row(const Convolution& g, const AmxBlock& block, int64_t item, char* to, char** next) {
  const int64_t piece_step = block.piece, image = block.image + item / block.in_rows;
  const int64_t row = block.row * g.stride - g.padding + item % block.in_rows;
  const int32_t zero = Format::zero(g, image);
  *next = to + block.input(item) * kRowBytes;
  if (item % block.in_rows == block.in_rows - 1) {  // the one pixel behind the image
    clear_pixels<Format>(*next + block.columns * kRowBytes, piece_step, 1, zero);
  }
  if (row < 0 || row >= g.in_height()) {
    clear_pixels<Format>(*next, piece_step, block.columns, zero);
    return nullptr;
  }
  return static_cast<const T*>(g.x) + (image * g.height + row / g.scale) * g.width * g.x_pixel;
}

// Items: rows of inputs of all images. to: [chunk][piece][pixel][64 bytes].
template <Transform kTransform, class T, class Format>
void copy_pixels(const Convolution& g, const AmxBlock& block, char* to, int64_t begin, int64_t end) {
  constexpr int kVectors = Format::kChunk / kLanes;
  const int64_t piece_step = block.piece;
  const int64_t before = g.padding < block.columns ? g.padding : block.columns;  // pixels of padding
  const int64_t inside = g.in_width() < block.columns - before ? g.in_width() : block.columns - before;
  for (int64_t channel = 0; channel < g.channels; channel += Format::kChunk, to += Format::kPieces * piece_step) {
    const bool whole = channel + Format::kChunk <= g.channels;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = block.image + item / block.in_rows;
      char* next;
      const T* from = begin_row<T, Format>(g, block, item, to, &next);
      if (from == nullptr) continue;
      const int32_t zero = Format::zero(g, image);
      InputReader readers[kVectors];
      for (int i = 0; i < kVectors; ++i) {
        if (channel + i * kLanes < g.channels) readers[i] = InputReader(g, image, channel + i * kLanes);
      }
      Vec factors[kVectors];
      for (int i = 0; i < kVectors; ++i) factors[i] = Format::factor(g, image, channel + i * kLanes);
      clear_pixels<Format>(next, piece_step, before, zero);
      next += before * kRowBytes;
      for (int64_t column = 0; column < inside; ++column, next += kRowBytes) {
        const T* pixel = from + (g.scale == 2 ? column / 2 : column) * g.x_pixel + channel;
        Vec numbers[kVectors];
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) {
          const bool some = whole || channel + i * kLanes < g.channels;
          numbers[i] = some ? readers[i].template read<kTransform>(pixel + i * kLanes) : Vec{};
        }
        Format::write(next, piece_step, numbers, factors, zero);
      }
      clear_pixels<Format>(next, piece_step, block.columns - before - inside, zero);
    }
  }
}

// The same for few channels: each row of 64 bytes holds a pixel and its next kMerged - 1 neighbours, zeros beyond the
// end of the image's row.
template <Transform kTransform, class T, class Format, int kMerged>
void merge_pixels(const Convolution& g, const AmxBlock& block, char* to, int64_t begin, int64_t end) {
  constexpr int kVectors = Format::kChunk / kLanes, kPixelVectors = kVectors / kMerged;
  const int64_t piece_step = block.piece;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = block.image + item / block.in_rows;
    char* next;
    const T* from = begin_row<T, Format>(g, block, item, to, &next);
    if (from == nullptr) continue;
    const int32_t zero = Format::zero(g, image);
    InputReader readers[kPixelVectors];
    for (int i = 0; i < kPixelVectors; ++i) {
      if (i * kLanes < g.channels) readers[i] = InputReader(g, image, i * kLanes);
    }
    Vec numbers[kVectors] = {}, factors[kVectors];
    for (int i = 0; i < kVectors; ++i) factors[i] = Format::factor(g, image, i % kPixelVectors * kLanes);
    for (int64_t column = 1 - kMerged; column < block.columns; ++column) {
#pragma GCC unroll 4
      for (int i = 0; i < kPixelVectors * (kMerged - 1); ++i) numbers[i] = numbers[i + kPixelVectors];
      const int64_t last = column + kMerged - 1, x = last - g.padding;
      const bool inside = last < block.columns && x >= 0 && x < g.in_width();
      const T* pixel = from + (g.scale == 2 ? x / 2 : x) * g.x_pixel;
#pragma GCC unroll 4
      for (int i = 0; i < kPixelVectors; ++i) {
        const bool some = inside && i * kLanes < g.channels;
        numbers[(kMerged - 1) * kPixelVectors + i] =
            some ? readers[i].template read<kTransform>(pixel + i * kLanes) : Vec{};
      }
      if (column < 0) continue;
      Format::write(next, piece_step, numbers, factors, zero);
      next += kRowBytes;
    }
  }
}

template <class T, class Format>
void amx_input(const Convolution& g, const AmxBlock& block, char* to, int64_t begin, int64_t end) {
  const auto run = [&](auto transform) FD_INLINE {
    constexpr Transform kTransform = decltype(transform)::value;
    if constexpr (Format::kMerges) {
      if (block.merged == 3) return merge_pixels<kTransform, T, Format, 3>(g, block, to, begin, end);
      if (block.merged == 2) return merge_pixels<kTransform, T, Format, 2>(g, block, to, begin, end);
    }
    return copy_pixels<kTransform, T, Format>(g, block, to, begin, end);
  };
  switch (transform_of(g)) {
    case Transform::plain: return run(std::integral_constant<Transform, Transform::plain>{});
    case Transform::normalised: return run(std::integral_constant<Transform, Transform::normalised>{});
    case Transform::activated: return run(std::integral_constant<Transform, Transform::activated>{});
  }
}

// ---- Products.

// Writes the sums of 32 pixels to the output, pixel by pixel, so that this can be done while AMX is busy with the next
// sums.
template <class T, class Format>
struct OutputWriter {
  const float* sums;      // [pixel][outputs]
  int64_t remaining = 0;  // pixels
  int64_t at, column, columns, out_width, channel, lanes, more;
  bool gated;             // whether the second vector of outputs has the gates of the first
  bool alternating;       // whether values and gates take turns
  Vec bias, bias_of_more, scales;

  FD_HD OutputWriter() {}

  FD_HD OutputWriter(const Convolution& g, const AmxBlock& block, int64_t run, int64_t first, int64_t count,
                     int64_t channel_, const char* header, const float* sums_)
      : sums(sums_), remaining(count), columns(block.columns), out_width(g.out_width), channel(channel_) {
    const int64_t image = block.image + (block.flat ? run : run / block.rows);
    const int64_t row = block.row + (block.flat ? first / columns : run % block.rows);
    column = block.flat ? first % columns : first;
    at = (image * g.out_height + row) * out_width + (column < out_width ? column : out_width);
    lanes = lanes_at(g, channel);
    more = Format::kOutputs > kLanes && channel + kLanes < g.out_channels ? lanes_at(g, channel + kLanes) : 0;
    gated = more > 0 && g.activation == Activation::geglu;
    alternating = !gated && g.activation == Activation::geglu;
    if (gated) lanes = g.results - channel / 2 < kLanes ? g.results - channel / 2 : kLanes;
    bias = bias_at(g, channel, gated ? kLanes : lanes);
    bias_of_more = more > 0 ? bias_at(g, channel + kLanes, more) : Vec{};
    scales = Format::scales(g, header, image);
  }

  FD_HD void advance(const Convolution& g, int64_t count, GatedOutputs<T>& gated_outputs) {
    for (; count > 0 && remaining > 0; --count, --remaining, sums += Format::kOutputs) {
      if (column < out_width && gated) {
        const Vec gate = activated<T>(Activation::gelu, Format::sum(sums, 1, scales) + bias_of_more);
        store_pixel<T>(g, at++, channel / 2, lanes, (Format::sum(sums, 0, scales) + bias) * gate);
      } else if (column < out_width && alternating) {
        gated_outputs.add(g, at++, channel, lanes, Format::sum(sums, 0, scales) + bias);
      } else if (column < out_width) {
        finish_pixel<T>(g, at, channel, lanes, Format::sum(sums, 0, scales) + bias);
        if (more > 0) finish_pixel<T>(g, at, channel + kLanes, more, Format::sum(sums, 1, scales) + bias_of_more);
        ++at;
      }
      if (++column == columns) column = 0;
    }
  }
};

// Items: pairs of a panel of outputs and 32 pixels of a run, ordered by block.panels_first.
template <class T, class Format>
void amx_multiply(const Convolution& g, const AmxBlock& block, const char* from, int64_t begin, int64_t end) {
  load_shapes();
  alignas(64) float sums[2][Format::kSums * 32 * Format::kOutputs];
  OutputWriter<T, Format> before;
  GatedOutputs<T> gated_outputs;
  const int64_t panels = (g.out_channels + Format::kOutputs - 1) / Format::kOutputs;
  const int64_t wide = (g.kernel + block.merged - 1) / block.merged, taps = g.kernel * wide;
  int64_t offsets[9];
  for (int64_t tap = 0; tap < taps; ++tap) {
    offsets[tap] = (tap / wide * block.columns + tap % wide * block.merged) * block.pixel;
  }
  const int64_t run_blocks = (block.length + 31) / 32, blocks = block.runs * run_blocks;
  Factors f{};
  f.piece_step = block.piece;
  f.chunks = (g.channels + Format::kChunk - 1) / Format::kChunk, f.taps = offsets, f.tap_count = taps;
  const int64_t group_bytes = Format::kOutputs / 16 * Format::kPieces * kTileBytes;  // of weights, for a tap and chunk
  const int64_t panel_bytes = Format::kHeaderBytes + f.chunks * taps * group_bytes;
  char* tail = nullptr;  // the last pixels, where they do not fill a tile
  for (int64_t item = begin; item < end; ++item) {
    const int64_t panel = block.panels_first ? item / blocks : item % panels;
    const int64_t pixels_32 = block.panels_first ? item % blocks : item / panels;
    const int64_t run = pixels_32 / run_blocks, first = pixels_32 % run_blocks * 32;
    const int64_t count = block.length - first < 32 ? block.length - first : 32;
    const char* header = reinterpret_cast<const char*>(g.weight) + panel * panel_bytes;
    f.left = from + (block.start(g, run) + first * g.stride) * block.pixel;
    f.row_step = g.stride * block.pixel, f.chunk_step = block.chunk;
    if (block.in_place && count % 16 != 0) {  // a tile would be read beyond the end of x
      const int64_t bytes = f.chunks * kRowBytes;
      if (tail == nullptr) {
        tail = reinterpret_cast<char*>(buffer(32 * bytes / 4, 2));
        for (int64_t i = 0; i < count; ++i) memcpy(tail + i * bytes, f.left + i * block.pixel, bytes);
        memset(tail + count * bytes, 0, (32 - count) * bytes);
      }
      f.left = tail, f.row_step = bytes, f.chunk_step = kRowBytes;
    }
    f.right = header + Format::kHeaderBytes;
    const bool fetching = block.panels_first && panel + 1 < panels;
    f.fetch = fetching ? (group_bytes / 64 + blocks - 1) / blocks : 0;
    f.next = header + panel_bytes + pixels_32 * f.fetch * f.chunks * taps * 64;
    const int64_t pixels = (before.remaining + f.chunks * taps - 1) / (f.chunks * taps);
    const auto overlapped = [&]() FD_INLINE { before.advance(g, pixels, gated_outputs); };
    float* here = sums[item % 2];
    const int64_t channel = panel * Format::kOutputs;
    const int32_t zero = Format::zero(g, block.image + (block.flat ? run : run / block.rows));
    Format::multiply(count, g.out_channels - channel, f, header, zero, here, overlapped);
    before = OutputWriter<T, Format>(g, block, run, first, count, channel, header, here);
  }
  before.advance(g, before.remaining, gated_outputs);
  gated_outputs.finish(g);
  _tile_release();
}

template <class T, class Format>
AmxConvolutionKernels kernels_of() {
  AmxConvolutionKernels set{amx_input<T, Format>,
                            amx_multiply<T, Format>,
                            nullptr,
                            nullptr,
                            nullptr,
                            nullptr,
                            Format::kPieces,
                            Format::kChunk,
                            Format::kOutputs,
                            Format::kHeaderBytes,
                            Format::kMerges};
  if (Format::kHeaderBytes > 0) {
    set.largest = amx_largest<T>;
    set.largest_bound = amx_largest_bound;
    set.scale = amx_scale;
    set.poison_non_finite = amx_poison_non_finite<T>;
  }
  return set;
}
