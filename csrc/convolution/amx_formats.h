// The formats of the factors of convolutions by AMX, and the scales of images in int8 limbs. Included after
// convolution/pixels_cpu.h and amx/tile_gemm.h.

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
